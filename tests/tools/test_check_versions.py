"""The script that runs the tests in an oldest and a newest environment; none is made here."""

import re
import sys
from pathlib import Path

import check_versions
import pytest
import setup_env

from iou_balanced_d2.errors import UserError

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest
def test_passes(): pass
def test_passes_too(): pass
def test_fails(): assert 0
@pytest.mark.skip(reason="to be counted")
def test_skips(): pass
@pytest.fixture
def broken(): raise RuntimeError
def test_has_an_error(broken): pass
"""


@pytest.fixture(scope="module")
def claims():
    return check_versions.requirements()


def test_every_requirement_of_setup_py_has_a_floor(claims):
    pins = dict(pin.split("==") for pin in check_versions.oldest(claims) if "==" in pin)
    assert {"torch", "torchvision", "numpy", "opencv-python", "faster-coco-eval"} <= pins.keys()
    assert pins["opencv-python-headless"] == pins["opencv-python"]
    assert not {"ruff", "pytest", "detectron2"} & pins.keys()
    for line in (ROOT / "requirements/package.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split(">=")
            assert pins[name] == version


def test_pythons_that_setup_py_names_are_those_from_oldest_to_newest():
    text = (ROOT / "setup.py").read_text()
    low, high = map(int, re.search(r"for minor in range\((\d+), (\d+)\)", text).groups())
    assert ((3, low), (3, high - 1)) == (setup_env.OLDEST, setup_env.NEWEST)
    assert f'python_requires=">=3.{low}"' in text


def test_floors_become_pins_and_a_requirement_without_one_is_named():
    pins = check_versions.oldest(["torch>=2.0", "omegaconf>=2.1,<2.4"])
    assert pins == ["setuptools<81", "torch==2.0", "omegaconf==2.1"]
    for line in ("tqdm", "tqdm>4.29.0"):
        with pytest.raises(UserError, match=f"'{line}' of setup.py has no oldest version"):
            check_versions.oldest([line])


def test_tests_are_counted_from_pytests_report(tmp_path):
    (tmp_path / "test_some.py").write_text(SUITE)
    report = tmp_path / "report.xml"
    outcome = check_versions.run_tests(sys.executable, [str(tmp_path)], report)
    assert outcome[:3] == (2, 2, 1)
    # The report of a run before is not taken for this one's.
    with pytest.raises(UserError, match="did not run the tests"):
        check_versions.run_tests(sys.executable, ["--no-such-option"], report)


def test_what_is_selected_and_left_out_exists():
    deselected = [x.split("=")[1] for x in check_versions.NOT_WITH_OLDEST]
    for test in (*check_versions.SELECTION, *deselected):
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), test
        assert not name or f"\ndef {name}(" in (ROOT / path).read_text(), test


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The script with environments made in no time, in which so many tests fail."""

    def run(*args, failed=0):
        made = []
        monkeypatch.setattr(check_versions, "make_environment",
                            lambda *x: made.append(x) or sys.executable)  # fmt: skip
        outcome = check_versions.Outcome(9, failed, 1, 12.3)
        monkeypatch.setattr(check_versions, "run_tests", lambda *x: outcome)
        monkeypatch.setattr(check_versions, "requirements", lambda: ["torch>=2.0"])
        argv = ["check_versions.py", "--output", str(tmp_path), *args]
        monkeypatch.setattr(sys, "argv", argv)
        return check_versions.main(), made

    return run


def test_the_table_has_both_environments(command, capsys, tmp_path):
    code, made = command("tests/test_import.py")
    assert code == 0
    assert [python for python, _, _ in made] == ["python3.10", "python3.13"]
    assert [path.name for _, _, path in made] == ["oldest.txt", "constraints.txt"]
    assert "torch==2.0\n" in (tmp_path / "oldest.txt").read_text()
    out = capsys.readouterr().out
    assert out.startswith("tests: tests/test_import.py\n")
    header, _, oldest, newest = out.splitlines()[2:]
    names = [word.strip() for word in header.split("|")]
    assert names[2:5] == ["Python", "torch", "torchvision"]
    assert [line.split("|")[1].strip() for line in (oldest, newest)] == ["oldest", "newest"]
    assert [word.strip() for word in newest.split("|")[-5:-1]] == ["9", "0", "1", "12"]


def test_failures_and_mistakes_are_the_exit_code(command, capsys, tmp_path, monkeypatch):
    code, made = command("--only", "newest", failed=2)
    assert (code, len(made)) == (1, 1)
    monkeypatch.undo()
    argv = ["check_versions.py", "--output", str(tmp_path), "--oldest", "python0.1"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(check_versions, "requirements", lambda: ["torch>=2.0"])
    assert check_versions.main() == 2
    assert "error: 'python0.1' can't be run" in capsys.readouterr().err
