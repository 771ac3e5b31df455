"""The script that runs the tests in an oldest and a newest environment; none is made here."""

import re
import sys
from importlib import metadata
from pathlib import Path

import check_versions
import pytest

from iou_balanced_d2.errors import UserError

ROOT = Path(__file__).parents[2]


def test_every_requirement_becomes_a_pin_of_its_floor():
    lines = ["torch>=2.0", "opencv-python>=4.5", 'mypy; extra == "dev"', "omegaconf>=2.1,<2.4"]
    assert check_versions.oldest(lines) == [
        "setuptools<81", "torch==2.0", "opencv-python==4.5", "opencv-python-headless==4.5",
        "omegaconf==2.1",
    ]  # fmt: skip
    assert len(check_versions.oldest(metadata.requires("iou_balanced_d2"))) > 12


@pytest.mark.parametrize("line", ["tqdm", "tqdm>4.29.0"])
def test_a_requirement_without_a_floor_is_named(line):
    with pytest.raises(UserError, match=f"'{line}' has no oldest version"):
        check_versions.oldest([line])


def test_what_is_selected_and_left_out_exists():
    deselected = [option.split("=")[1] for option in check_versions.NOT_WITH_OLDEST]
    for test in (*check_versions.SELECTION, *deselected):
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), test
        assert not name or re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), test


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The script with environments that are made in no time; returns its exit code and calls."""

    def run(*args, passes=True):
        calls = []
        monkeypatch.setattr(check_versions, "run_tests", lambda *x: calls.append(x) or passes)
        monkeypatch.setattr(sys, "argv", ["check_versions.py", "--output", str(tmp_path), *args])
        return check_versions.main(), calls

    return run


def test_both_environments_run_the_tests(command, capsys, tmp_path):
    code, calls = command("tests/test_import.py")
    assert code == 0
    oldest, newest = calls
    assert oldest == ("python3.10", tmp_path / "oldest", tmp_path / "oldest.txt",
                      ["tests/test_import.py", *check_versions.NOT_WITH_OLDEST])  # fmt: skip
    assert newest[0] == "python3.13"
    assert newest[2:] == (ROOT / "constraints.txt", ["tests/test_import.py"])
    assert "torch==2.0.0" in (tmp_path / "oldest.txt").read_text().splitlines()
    assert capsys.readouterr().out.count("passed") == 2


def test_failures_and_mistakes_are_the_exit_code(command, capsys, tmp_path, monkeypatch):
    code, calls = command("--only", "newest", passes=False)
    assert (code, len(calls)) == (1, 1)
    assert "newest" in capsys.readouterr().out
    monkeypatch.undo()
    argv = ["check_versions.py", "--output", str(tmp_path), "--oldest", "python0.1"]
    monkeypatch.setattr(sys, "argv", argv)
    assert check_versions.main() == 2
    assert "error: 'python0.1' could not make" in capsys.readouterr().err
