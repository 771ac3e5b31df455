"""What is shown on the console and what is in log.txt only."""

import io
import logging
import sys

import pytest
from detectron2.utils import logger as d2_logger

from iou_balanced_d2.engine.console import _losses, setup_loggers

from ..toy import toy_config, toy_model

NAMES = ("iou_balanced_d2", "fvcore", "detectron2")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Fresh loggers; a function that logs and returns what is on the console and in log.txt."""
    console = io.StringIO()
    monkeypatch.setattr(sys, "stdout", console)
    for name in NAMES:
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    d2_logger.setup_logger.cache_clear()
    setup_loggers(str(tmp_path))
    setup_loggers(str(tmp_path))  # again changes nothing

    def written(name, level, message, **kwargs):
        logging.getLogger(name).log(level, message, **kwargs)
        for handler in logging.getLogger(name.split(".")[0]).handlers:
            handler.flush()
        found = (tmp_path / "log.txt").read_text()
        (tmp_path / "log.txt").open("w").close()
        shown = console.getvalue()
        console.seek(0)
        console.truncate()
        return shown, found

    yield written
    d2_logger.setup_logger.cache_clear()


@pytest.mark.parametrize(
    "name", ["detectron2", "detectron2.data.build", "detectron2.engine.defaults"]
)
def test_setting_up_is_in_the_file_only_but_warnings_are_shown(log, name):
    shown, written = log(name, logging.INFO, "Running with full config")
    assert shown == ""
    assert "Running with full config" in written
    shown, written = log(name, logging.WARNING, "Beware")
    assert "Beware" in shown
    assert "Beware" in written


@pytest.mark.parametrize("name", ["detectron2.utils.events", "iou_balanced_d2.engine.main"])
def test_progress_is_shown_once(log, name):
    shown, written = log(name, logging.INFO, "iter: 19")
    assert shown.count("iter: 19") == written.count("iter: 19") == 1


def test_long_lists_of_others_are_cut_on_the_console_only(log):
    text = "\n".join(f"weight{i}" for i in range(20))
    shown, written = log("fvcore.common.checkpoint", logging.WARNING, text)
    assert shown.splitlines()[1:] == ["weight1", "weight2", "... 17 more lines in log.txt"]
    assert "weight19" in written
    shown, _ = log("iou_balanced_d2.evaluation", logging.INFO, text)
    assert "weight19" in shown, "our own tables are whole"


def test_tracebacks_are_whole(log):
    def fail(depth):
        return fail(depth - 1) if depth else 1 / 0

    try:
        fail(9)
    except ZeroDivisionError:
        shown, _ = log("detectron2.engine", logging.ERROR, "Failed", exc_info=sys.exc_info())
    assert "ZeroDivisionError" in shown


def test_colours_are_not_in_the_file(log):
    _, written = log("detectron2", logging.INFO, "\x1b[38;5;204mMODEL\x1b[39m: x")
    assert written.endswith("MODEL: x\n")
    assert "\x1b" not in written


def test_the_line_of_the_losses_tells_a_control_from_the_baseline():
    plain = ["MODEL.IOU_BALANCED.CLS_ETA", 0.0, "MODEL.IOU_BALANCED.LOC_LAMBDA", 0.0]
    line = "classification positives x IoU^0; box smooth_l1"
    assert _losses(toy_config(*plain), toy_model(*plain)) == line
    control = [*plain, "MODEL.IOU_BALANCED.LOC_WEIGHT", 1.08]
    assert _losses(toy_config(*control), toy_model(*control)) == f"{line} x 1.08"
