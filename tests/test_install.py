"""tools/setup_env.py: which commands it runs where. None of them installs anything here."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setup_env

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
REQUIRED = ["torch>=2.0.0", "numpy>=1.22", "tqdm>=4.60", "opencv-python>=4.5"]
REQUIRED += ['pytest>=9; extra == "dev"', 'yacs>=0.1.8; extra == "detectron2"']


def add_package(packages, name, version="1.0", requires=()):
    """A package that imports, with its metadata."""
    (packages / name).mkdir()
    (packages / name / "__init__.py").write_text("")
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Makes an environment with some packages, and pip."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def make(name, *packages):
        folder = tmp_path / name
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (site_packages,) = folder.glob(setup_env.PACKAGES)
        (pip,) = Path(sys.prefix).glob(f"{setup_env.PACKAGES}/pip")
        (site_packages / "pip").symlink_to(pip)
        add_package(site_packages, "iou_balanced_d2", requires=REQUIRED)
        for package in packages:
            add_package(site_packages, *package.split("=="))
        return folder

    return make


@pytest.fixture
def set_up(monkeypatch, environment):
    """Runs set_up by this Python, or that of an environment; returns what it would run."""

    def run(folder, constraints=CONSTRAINTS, use_this_python=False, base=None):
        commands = []

        def record(*command):
            commands.append(" ".join(map(str, command)))
            if "venv" in command:
                subprocess.run(list(map(str, command)), check=True)
                (packages,) = folder.glob(setup_env.PACKAGES)
                add_package(packages, "iou_balanced_d2", requires=REQUIRED)

        base = base or environment("base")
        code = "import json, sys; print(json.dumps(sys.path[1:]))"
        path = subprocess.run([base / "bin/python", "-c", code], capture_output=True).stdout
        monkeypatch.setattr(sys, "path", ast.literal_eval(path.decode()))
        monkeypatch.setattr(sys, "executable", str(base / "bin/python"))
        monkeypatch.setattr(setup_env, "run", record)
        try:
            setup_env.set_up(folder, constraints, use_this_python)
        finally:
            monkeypatch.undo()
            monkeypatch.delenv("PYTHONPATH", raising=False)
        return commands

    return run


def test_clean_machine_gets_the_tested_versions(set_up, tmp_path):
    folder = tmp_path / ".venv"
    made, pip, tools, package, packages, detectron2, check = set_up(folder)
    assert made.endswith(f"-m venv --without-pip {folder}")
    assert re.search(r"base/bin/python -m pip install -q --target .*/site-packages pip$", pip)
    assert tools.endswith(f"-c {CONSTRAINTS} pip setuptools")
    assert package.endswith(f"--no-deps -e {ROOT}")
    assert re.search(f"-c {CONSTRAINTS} numpy>=1.22 opencv-python(-headless)?>=4.5 pytest>=9 "
                     "torch>=2.0.0 tqdm>=4.60 yacs>=0.1.8$", packages)  # fmt: skip
    assert "--no-deps" in detectron2
    assert "--require-hashes" in detectron2
    assert detectron2.endswith("requirements/detectron2.txt")
    assert check.startswith(f"{folder}/bin/python -c import cv2")


def test_nothing_is_done_while_the_stamp_is_valid(set_up, environment, tmp_path):
    folder = environment(".venv", "sal_detectron2==0.7.2")
    assert set_up(folder)
    assert set_up(folder, base=tmp_path / "base") == []
    assert set_up(folder, use_this_python=True, base=tmp_path / "base") == []
    other = tmp_path / "other.txt"
    other.write_text("torch==2.0.0")
    commands = set_up(folder, other, base=tmp_path / "base")
    assert not any("-m venv" in command for command in commands)
    assert sum(f"-c {other}" in command for command in commands) == 2


def test_setup_that_fails_is_not_stamped(environment, monkeypatch):
    folder = environment(".venv", "sal_detectron2==0.7.2")

    def fail(*command):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(setup_env, "run", fail)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            setup_env.set_up(folder, CONSTRAINTS, False)


@pytest.mark.parametrize("where", ["environment", "base"])
def test_a_detectron2_that_imports_is_kept_with_all_packages(where, set_up, environment, tmp_path):
    found = "torch==2.1.0+cu118", "torchvision==0.16", "detectron2==0.6", "numpy==1.26", "cv2==4"
    if where == "environment":
        folder, base = environment(".venv", *found, "pytest==8.0"), None
    else:
        folder, base = tmp_path / ".venv", environment("base", *found, "pytest==8.0")
    commands = set_up(folder, base=base)
    assert any("-m venv" in command for command in commands) is (where == "base")
    assert not any("detectron2.txt" in command for command in commands)
    (packages,) = (command for command in commands if "found.txt" in command)
    # Names alone, so that pytest 8.0 will do; OpenCV imports, whatever its distribution's name.
    assert packages.endswith(f"-c {folder}/found.txt numpy pytest tqdm yacs")
    held = (folder / "found.txt").read_text().splitlines()
    assert {"torch==2.1.0+cu118", "numpy==1.26", "pytest==8.0"} <= set(held)


def test_a_detectron2_that_does_not_import_is_not_replaced(set_up, environment):
    folder = environment(".venv", "detectron2==0.6")  # without torch
    with pytest.raises(SystemExit, match=r"your detectron2 in .* can't be imported"):
        set_up(folder)
    assert not (folder / ".setup-stamp").exists()


def test_another_python_makes_the_environment_anew_only_if_it_is_named(set_up, environment):
    folder = environment(".venv", "sal_detectron2==0.7.2")
    (folder / "lib" / "python{}.{}".format(*sys.version_info)).rename(folder / "lib/python3.9")
    add = set_up(folder)
    assert not any("-m venv" in command for command in add)
    anew = set_up(folder, use_this_python=True, base=folder.parent / "base")
    assert f"-m venv --without-pip --clear {folder}" in anew[0]


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 18), (3, 14, 0)])
def test_an_untested_python_is_refused_in_one_line(version, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit, match=r"3\.10 to 3\.13.*PYTHON=python3\.12 make setup$"):
        setup_env.set_up(tmp_path / ".venv", CONSTRAINTS, True)
    # The Python itself must be able to read the script that refuses it.
    ast.parse(Path(setup_env.__file__).read_text(), feature_version=(3, 6))


def test_constraints_pin_every_line_and_every_requirement():
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line[0] != "#"]
    pattern = r'([a-z0-9.-]+)==([0-9][0-9a-z.]*)( ; python_version (<|>=) "3\.11")?'
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [line for line, match in zip(lines, found, strict=True) if match is None] == []
    names = {match[1] for match in found}
    required = metadata.requires("iou_balanced_d2")
    wanted = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in required}
    assert wanted | {"pip", "opencv-python", "opencv-python-headless"} <= names
    for old in ("", ' ; python_version < "3.11"'):
        assert any(line.startswith("numpy==") and line.endswith(old) for line in lines)


def test_detectron2_is_pinned_by_its_hash():
    text = (ROOT / "requirements" / "detectron2.txt").read_text()
    sha256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
    assert re.search(rf"^sal-detectron2==0\.7\.2 \\\n +--hash=sha256:{sha256}$", text, re.M)
