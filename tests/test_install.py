"""tools/setup_env.py: what it does with which facts. Nothing is installed here."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import setup_env
from setup_env import Facts, Interpreter, SetupError, Step

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BARE = Interpreter("/usr/bin/python3", (3, 11))
OWN_BUILD = Interpreter(
    "/usr/bin/python3",
    (3, 11),
    packages={"torch": "2.1.0+cu118", "torchvision": "0.16.0", "numpy": "1.26.4", "yacs": "0.1.8"},
    detectron2="/src/detectron2/detectron2/__init__.py",
    has_cv2=True,
)
SET_UP = Interpreter(
    str(VENV / "bin" / "python"),
    (3, 11),
    packages={"torch": "2.15.0", "sal-detectron2": "0.7.2"},
    detectron2=str(VENV / "lib/python3.11/site-packages/detectron2/__init__.py"),
    has_cv2=True,
)
BUILT_INSIDE = dataclasses.replace(
    OWN_BUILD, executable=SET_UP.executable, detectron2=SET_UP.detectron2
)


def facts(**changes: object) -> Facts:
    """Return the facts of a fresh clone, but for `changes`."""
    fresh = Facts(
        root=ROOT,
        venv_dir=VENV,
        base=BARE,
        venv=None,
        key="now",
        requirements=setup_env.read_requirements(ROOT),
    )
    return dataclasses.replace(fresh, **changes)  # type: ignore[arg-type]


def commands(steps: list[Step]) -> list[str]:
    return [" ".join(step.command) for step in steps]


def installed(steps: list[Step]) -> set[str]:
    """Return the names of what the steps name on a command line, not in a file."""
    words = {w for s in steps if "pip" in s.command for w in s.command[3:] if w[0] not in "-/"}
    return {setup_env.requirement_name(w) for w in words}


def test_fresh_clone_installs_the_tested_versions() -> None:
    steps = setup_env.plan(facts())
    made, tools, packages, package, detectron2, check = commands(steps)
    assert made == f"/usr/bin/python3 -m venv --clear {VENV}"
    assert tools.endswith(f"-c {ROOT / 'constraints.txt'} pip setuptools")
    assert f"-c {ROOT / 'constraints.txt'}" in packages
    assert package.endswith(f"--no-deps --editable {ROOT}")
    assert "--require-hashes" in detectron2
    assert "--no-deps" in detectron2
    assert str(VENV / "lib/python3.11/site-packages") in detectron2
    assert check.startswith(f"{VENV / 'bin' / 'python'} -c")


def test_nothing_is_done_while_the_stamp_is_valid() -> None:
    assert setup_env.plan(facts(venv=SET_UP, stamp="now")) == []


def test_a_stamp_without_an_environment_is_not_valid() -> None:
    assert len(setup_env.plan(facts(stamp="now"))) == 6


def test_stale_stamp_updates_in_place_and_keeps_detectron2() -> None:
    lines = commands(setup_env.plan(facts(venv=SET_UP, stamp="before")))
    assert not any("-m venv" in line or "detectron2.txt" in line for line in lines)
    assert any(f"-c {ROOT / 'constraints.txt'} -r" in line for line in lines)


def test_cut_off_setup_starts_from_an_empty_environment() -> None:
    lines = commands(setup_env.plan(facts(venv=SET_UP, damaged=True)))
    assert lines[0].endswith(f"-m venv --clear {VENV}")
    assert any("detectron2.txt" in line for line in lines)


def test_environment_keeps_its_python_unless_one_is_named() -> None:
    other = dataclasses.replace(BARE, version=(3, 12))
    lines = commands(setup_env.plan(facts(venv=SET_UP, base=other)))
    assert not any("-m venv" in line for line in lines)
    lines = commands(setup_env.plan(facts(venv=SET_UP, base=other, base_chosen=True)))
    assert "-m venv" in lines[0]
    assert any("python3.12/site-packages" in line for line in lines)


@pytest.mark.parametrize("base", [OWN_BUILD, dataclasses.replace(OWN_BUILD, has_cv2=False)])
def test_detectron2_of_the_base_is_used_as_found(base: Interpreter) -> None:
    steps = setup_env.plan(facts(base=base))
    lines = commands(steps)
    assert "--system-site-packages" in lines[0]
    assert not installed(steps) & {"torch", "torchvision", "detectron2", "numpy", "yacs"}
    assert not any("detectron2.txt" in line or " -r " in line for line in lines)
    assert {"fvcore", "pytest", "ruff"} <= installed(steps)
    assert ("opencv-python" in installed(steps)) is not base.has_cv2
    # The tested versions are for pip and setuptools only; the rest has to fit what was found.
    assert [("constraints.txt" in line) for line in lines].count(True) == 1
    (held,) = (text for step in steps for text in step.files.values())
    assert {"torch==2.1.0+cu118", "numpy==1.26.4"} <= set(held.splitlines())


def test_packages_of_an_active_environment_are_shared() -> None:
    base = dataclasses.replace(OWN_BUILD, site_dirs=("/home/me/env/lib/python3.11/site-packages",))
    steps = setup_env.plan(facts(base=base))
    (file,) = (f for s in steps for f in s.files if f.suffix == ".pth")
    assert file.parent == VENV / "lib/python3.11/site-packages"
    text = next(s.files[file] for s in steps if file in s.files)
    assert text == f"import site; site.addsitedir('{base.site_dirs[0]}')\n"


def test_detectron2_built_inside_the_environment_is_never_replaced() -> None:
    steps = setup_env.plan(facts(venv=BUILT_INSIDE, stamp="before"))
    assert not any("-m venv" in line or "detectron2.txt" in line for line in commands(steps))
    assert not installed(steps) & {"torch", "torchvision", "numpy"}
    with pytest.raises(SetupError, match="detectron2 of your own"):
        setup_env.plan(facts(venv=BUILT_INSIDE, damaged=True))
    broken = dataclasses.replace(BUILT_INSIDE, error="ImportError: no torch")
    with pytest.raises(SetupError, match="does not import"):
        setup_env.plan(facts(venv=broken))


def test_base_detectron2_that_does_not_import_is_left_alone() -> None:
    base = dataclasses.replace(OWN_BUILD, error="ImportError: undefined symbol")
    lines = commands(setup_env.plan(facts(base=base)))
    assert "--system-site-packages" not in lines[0]
    assert any("detectron2.txt" in line for line in lines)


def test_reupload_in_the_base_is_used_as_found() -> None:
    base = dataclasses.replace(
        OWN_BUILD, packages={**OWN_BUILD.packages, "sal-detectron2": "0.7.2"}
    )
    for venv in (None, dataclasses.replace(base, executable=SET_UP.executable)):
        steps = setup_env.plan(facts(base=base, venv=venv))
        assert not installed(steps) & {"torch", "torchvision", "numpy"}
        assert not any("detectron2.txt" in line for line in commands(steps))


@pytest.mark.parametrize(("version", "word"), [((3, 9), "old"), ((3, 14), "new")])
def test_untested_python_is_refused_in_one_line(version: tuple[int, int], word: str) -> None:
    with pytest.raises(SetupError, match=f"too {word}, this needs 3.10 to 3.13") as caught:
        setup_env.plan(facts(base=dataclasses.replace(BARE, version=version)))
    assert "PYTHON=python3.12 make setup" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_without_ensurepip() -> None:
    no_ensurepip = dataclasses.replace(BARE, has_ensurepip=False)
    made, tools, *_ = commands(setup_env.plan(facts(base=no_ensurepip)))
    assert "--without-pip" in made
    target = VENV / "lib/python3.11/site-packages"
    assert tools.startswith(f"/usr/bin/python3 -m pip install --target {target}")
    with pytest.raises(SetupError, match="apt install python3-venv"):
        setup_env.plan(facts(base=dataclasses.replace(no_ensurepip, has_pip=False)))


@pytest.mark.parametrize(("libs", "name"), [(True, "python"), (False, "python-headless")])
def test_opencv_fits_the_system(libs: bool, name: str) -> None:
    lines = commands(setup_env.plan(facts(has_display_libs=libs)))
    assert [line for line in lines if line.endswith(f" opencv-{name}")]


def test_constraints_pin_every_line_and_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    pattern = r'([a-z0-9.-]+)==([0-9][0-9a-z.]*)( ; python_version (<|>=) "3\.11")?'
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [line for line, match in zip(lines, found, strict=True) if match is None] == []
    names = {match[1] for match in found if match}
    wanted = set(map(setup_env.requirement_name, setup_env.read_requirements(ROOT)))
    assert wanted | {"pip", "opencv-python", "opencv-python-headless"} <= names
    for old in ("", ' ; python_version < "3.11"'):
        assert any(line.startswith("numpy==") and line.endswith(old) for line in lines)


def test_detectron2_is_pinned_by_its_hash() -> None:
    text = (ROOT / "requirements" / "detectron2.txt").read_text()
    sha256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
    assert re.search(rf"^sal-detectron2==0\.7\.2 \\\n +--hash=sha256:{sha256}$", text, re.M)


def test_key_follows_files_python_folder_and_projects(tmp_path: Path) -> None:
    for name in ("constraints.txt", "setup.py"):
        (tmp_path / name).write_text("")
    key = setup_env.setup_key(tmp_path, tmp_path / ".venv", (3, 11))
    assert key == setup_env.setup_key(tmp_path, tmp_path / ".venv", (3, 11))
    assert key != setup_env.setup_key(tmp_path, tmp_path / ".venv", (3, 12))
    assert key != setup_env.setup_key(tmp_path, tmp_path / "moved", (3, 11))
    (tmp_path / "projects/FCOS/fcos").mkdir(parents=True)
    (tmp_path / "projects/FCOS/fcos/__init__.py").write_text("")
    with_project = setup_env.setup_key(tmp_path, tmp_path / ".venv", (3, 11))
    (tmp_path / "constraints.txt").write_text("yacs==0.1.8")
    assert len({key, with_project, setup_env.setup_key(tmp_path, tmp_path / ".venv", (3, 11))}) == 3


def test_stamp_is_written_only_after_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Step("good", (sys.executable, "-c", "print('fine')"))
    bad = Step("bad", (sys.executable, "-c", "raise SystemExit('No space left on device')"))
    stamp, running = tmp_path / setup_env.STAMP, tmp_path / setup_env.RUNNING
    here = facts(venv_dir=tmp_path)
    setup_env.run_steps(here, [good])
    assert (stamp.read_text(), running.exists()) == ("now", False)
    with pytest.raises(SetupError, match="bad: the disk is full"):
        setup_env.run_steps(here, [good, bad])
    assert not stamp.exists()
    assert not running.exists()
    assert "1/2 good" in capsys.readouterr().out
    stop = Step("stop", (sys.executable, "-c", ""), {tmp_path / "no" / "folder": ""})
    with pytest.raises(FileNotFoundError):
        setup_env.run_steps(here, [stop])
    assert running.exists()


def make_fake_environment(folder: Path) -> str:
    """Return the Python of a virtual environment with a detectron2 of a person's own."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = setup_env.site_packages(facts(venv_dir=folder), sys.version_info[:2])
    for name in ("torch", "torchvision", "detectron2"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("")
        (packages / f"{name}-1.0.dist-info").mkdir()
        (packages / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Name: {name}\nVersion: 1.0\n"
        )
    return str(folder / "bin" / "python")


def test_asking_a_python_with_a_fake_detectron2(tmp_path: Path) -> None:
    python = make_fake_environment(tmp_path / "env")
    answer = setup_env.ask(python)
    assert answer is not None
    assert answer.has_detectron2
    assert answer.packages == {"torch": "1.0", "torchvision": "1.0", "detectron2": "1.0"}
    assert (answer.has_cv2, answer.has_pip, answer.has_ensurepip) == (False, False, True)
    assert len(answer.site_dirs) == 1
    broken = Path(answer.detectron2)
    broken.write_text("raise ImportError('undefined symbol')")
    answer = setup_env.ask(python)
    assert answer is not None
    assert not answer.has_detectron2
    assert "undefined symbol" in answer.error
    assert setup_env.ask("/no/such/python") is None


def test_fresh_clone_with_a_fake_detectron2_in_the_python(tmp_path: Path) -> None:
    python = make_fake_environment(tmp_path / "env")
    for path in ("tools/setup_env.py", "constraints.txt", "setup.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    (tmp_path / "requirements").symlink_to(ROOT / "requirements")
    done = subprocess.run(
        [python, "tools/setup_env.py", "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert "--system-site-packages" in done.stdout
    assert "constraints.txt -r" not in done.stdout
    assert "torch>" not in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_folder_that_is_no_environment_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SetupError, match="is no virtual environment"):
        setup_env.gather_facts(ROOT, tmp_path, base_chosen=False)


def test_moved_environment_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "ask", lambda python: BARE)
    make_fake_environment(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert setup_env.gather_facts(ROOT, tmp_path / "b", base_chosen=False).damaged


def test_other_constraints_take_the_place_of_the_tested_versions(tmp_path: Path) -> None:
    oldest = tmp_path / "oldest.txt"
    oldest.write_text("torch==2.0.0")
    steps = commands(setup_env.plan(facts(constraints_file=oldest)))
    assert sum(f"-c {oldest}" in line for line in steps) == 2
    assert not [line for line in steps if "constraints.txt" in line]
    keys = {setup_env.setup_key(ROOT, VENV, (3, 10), file) for file in (None, oldest)}
    oldest.write_text("torch==2.1.0")
    keys.add(setup_env.setup_key(ROOT, VENV, (3, 10), oldest))
    assert len(keys) == 3
