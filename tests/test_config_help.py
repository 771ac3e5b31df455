"""The printed help of the config keys: complete, from the comments, and of keys that are used."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from iou_balanced_d2 import add_iou_balanced_config
from iou_balanced_d2.config.description import (
    KeyHelp,
    _commented_names,
    config_help,
    format_help,
)

ROOT = Path(__file__).parent.parent
KEYS = {item.key: item for item in config_help()}
# The tables of keys.
GUIDE = (ROOT / "docs/config.md").read_text()
# Of projects with a config.py of their own, to which their README refers.
OF_PROJECTS = ("MODEL.FCOS.", "MODEL.SSD.", "INPUT.SSD_AUG")


def code_of(*patterns):
    return "\n".join(
        path.read_text()
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if path.name not in ("defaults.py", "config.py", "options.py")  # where the keys are set
    )


CODE = code_of("iou_balanced_d2/**/*.py", "*.py", "tools/*.py")
OF_PROJECT = {
    path.name: code_of(f"projects/{path.name}/*/*.py") for path in ROOT.glob("projects/*")
}


def flat(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def add_toy_config(cfg):
    # What it is about:
    # all of it.
    cfg.MODEL.TOY = CfgNode()
    cfg.MODEL.TOY.ENABLED = False
    cfg.MODEL.TOY.SIZE = 3
    # eq. 2; many lines
    # of words.
    cfg.MODEL.TOY.POWERS = [
        1.0,
    ]
    cfg.MODEL.TOY.OTHER = 1

    cfg.MODEL.TOY.UNKNOWN = 2


def test_comments_are_read_with_the_keys_they_are_about():
    assert dict(_commented_names(add_toy_config)) == {
        "cfg.MODEL.TOY": "What it is about: all of it.",
        "cfg.MODEL.TOY.ENABLED": "What it is about: all of it.",
        "cfg.MODEL.TOY.SIZE": "What it is about: all of it.",
        "cfg.MODEL.TOY.POWERS": "eq. 2; many lines of words.",
        "cfg.MODEL.TOY.OTHER": "eq. 2; many lines of words.",
        "cfg.MODEL.TOY.UNKNOWN": "",
    }


class ToyOptions:
    """A docstring."""

    # eq. 2; many lines
    # of words.
    power: float = 1.0
    other: int = 1

    # Else.
    last: int = 2


def test_comments_of_fields_are_read_as_well():
    meaning = "eq. 2; many lines of words."
    expected = {"power": meaning, "other": meaning, "last": "Else."}
    assert dict(_commented_names(ToyOptions)) == expected


def test_every_key_that_is_added_is_there_with_its_default():
    ours = get_cfg()
    before = dict(flat(ours))
    add_iou_balanced_config(ours)
    added = {key: value for key, value in flat(ours) if key not in before}
    assert {key: item.default for key, item in KEYS.items()} == added


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_meaning_and_is_used(key):
    assert KEYS[key].meaning
    *_, section, name = key.split(".")
    if section == "IOU_BALANCED":  # handed on as arguments of the same name in lower case
        used, code = name.lower(), CODE
    elif key.startswith(OF_PROJECTS):
        (code,) = (code for project, code in OF_PROJECT.items() if project in key)
        used = rf"({section}|keys)\.{name}"
    else:
        used, code = rf"{section}\.{name}", CODE
    assert re.search(rf"\b{used}\b", code)


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith(OF_PROJECTS)])
def test_every_key_is_in_a_table_of_keys(key):
    in_table = key.removeprefix("MODEL.IOU_BALANCED.")
    assert re.search(rf"^\| [^|]*`{re.escape(in_table)}`[^|]* \|", GUIDE, re.MULTILINE)


def test_readmes_of_the_projects_say_where_their_keys_are():
    for config in ROOT.glob("projects/*/*/config.py"):
        readme = config.parents[1] / "README.md"
        assert f"[{config.parent.name}/config.py]" in readme.read_text()


def test_equations_of_the_losses_are_named():
    assert KEYS["MODEL.IOU_BALANCED.CLS_ETA"].meaning.startswith("eta of eq. 2")
    assert KEYS["MODEL.IOU_BALANCED.LOC_LAMBDA"].meaning.startswith("lambda of eq. 4")
    assert "eq. 4" in KEYS["MODEL.IOU_BALANCED.LOC_WEIGHT"].meaning


def test_keys_with_one_comment_stand_together():
    keys = [KeyHelp("A.ON", False, "words " * 30), KeyHelp("A.BY", "x", "words " * 30)]
    lines = format_help([*keys, KeyHelp("B", 1, "other")]).splitlines()
    assert lines[:2] == ["A.ON: False", "A.BY: 'x'"]
    assert lines[-3:] == ["", "B: 1", "    other"]
    assert all(line.startswith("    words") and len(line) <= 100 for line in lines[2:-3])


def test_the_command_prints_it_without_a_warning():
    command = [sys.executable, "-m", "iou_balanced_d2.config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr  # of runpy, about a module imported before
    assert done.stdout.startswith("MODEL.IOU_BALANCED.CLS_LOSS: 'iou_balanced'\n    The")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-W", "ignore", "-m", "iou_balanced_d2.config"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGPIPE
