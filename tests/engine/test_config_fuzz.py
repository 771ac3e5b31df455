"""Wrong types, ranges and names for every config key: one line that names it, or a training."""

import logging
import random
import shutil

import pytest
import torch
import yaml

from iou_balanced_d2.arguments import parse
from iou_balanced_d2.engine import Trainer, find_placement, load_config, prepare
from iou_balanced_d2.engine.config import flatten
from iou_balanced_d2.engine.faults import user_errors
from iou_balanced_d2.errors import UserError

from ..command import forget_own_data

WRONG_TYPES = ["foo", 3, 2.5, None, [], [1, 2], {"A": 1}, True, "a\0b"]
# What a key needs to be read at all.
SWITCHES = {
    "INPUT.CROP.": "INPUT.CROP.ENABLED",
    "MODEL.EMA.": "MODEL.EMA.ENABLED",
    "SOLVER.CLIP_GRADIENTS.": "SOLVER.CLIP_GRADIENTS.ENABLED",
    "TEST.AUG.": "TEST.AUG.ENABLED",
}
# Detectors' keys that the toy one does not have.
OTHERS = ("MODEL.RPN", "MODEL.ROI", "MODEL.SEM", "MODEL.PANO", "MODEL.PROP", "MODEL.KEYP",
          "MODEL.SSD", "MODEL.FCOS")  # fmt: skip
NUM_CASES_FAST = 100


def values_for(default):
    """Values of the default's type at and beyond the edges, and values of other types."""
    if isinstance(default, bool):
        own = [not default]
    elif isinstance(default, int):
        own = [-1, 0, 1, 7, 10**6, 10**12]
    elif isinstance(default, float):
        own = [-1.0, 0.0, 1e-9, 1.0, 1.5, 1e9, float("inf"), float("nan")]
    elif isinstance(default, list | tuple):
        x = list(default)
        n = max(len(x), 1)
        own = [x + x, x[::-1], x[:-1], [-1] * n, [0] * n, ["a"], [["a"]], [1e9] * 3, [x]]
    else:
        own = ["", "../x"]
    return own + WRONG_TYPES


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def config_of(key, value):
    """A config file's content: one key changed, and switched on."""
    content = nested(key, value)
    for start, switch in SWITCHES.items():
        if key.startswith(start) and key != switch:
            node = content
            for part in switch.split(".")[:-1]:
                node = node[part]
            node["ENABLED"] = True
    return {"_BASE_": "own.yaml", **content}


@pytest.fixture
def outcome(tmp_path, own_config, monkeypatch):
    """Prepare a config, and train it for a step if that succeeds; returns the refusal or ""."""
    monkeypatch.chdir(tmp_path)
    forget_own_data()

    def run(key, value, *, train):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "case.yaml").write_text(yaml.safe_dump(config_of(key, value)))
        args = parse("train", ["--config-file", "case.yaml"])
        try:
            cfg = prepare(args, find_placement(args))
        except UserError as error:
            return str(error)
        too_large = cfg.SOLVER.IMS_PER_BATCH > 1000  # for the memory: the system kills the process
        if train and not (too_large or key.startswith((*OTHERS, "DATASETS", "OUTPUT_DIR"))):
            torch.manual_seed(0)
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=False)
            trainer.max_iter = min(trainer.max_iter, 1)
            with user_errors():  # as the command does
                trainer.train()
        return ""

    yield run
    forget_own_data()


def all_cases(own_config):
    cases = [
        (key, value)
        for key, default in flatten(load_config(str(own_config))).items()
        for value in values_for(default)
    ]
    random.Random(0).shuffle(cases)
    return cases


def check_one_line(message, key, value):
    assert "\n" not in message, (key, value)


def check(message, key, value):
    check_one_line(message, key, value)
    # yacs's own words have the last part of the key only, and of the config's version nothing. With
    # SOLVER.AMP.ENABLED it is SOLVER.AMP.PRECISION that does not fit the CPU.
    section, _, name = key.rpartition(".")
    named = name in message or (section and section in message)
    assert named or not message, (key, value, message)


def test_a_config_is_refused_in_one_line_or_passes(own_config, outcome):
    for key, value in all_cases(own_config)[:NUM_CASES_FAST]:
        check(outcome(key, value, train=False), key, value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(8))
def test_a_config_is_refused_in_one_line_or_trains(own_config, outcome, part):
    cases = all_cases(own_config)
    assert len(cases) >= 2000
    cases = cases[part::8]
    logging.disable(logging.CRITICAL)
    try:
        for key, value in cases:
            try:
                check(outcome(key, value, train=True), key, value)
            except UserError as error:  # such as a loss that is not finite
                check_one_line(str(error), key, value)
            except Exception as error:
                raise AssertionError(f"{key}: {value!r}") from error
    finally:
        logging.disable(logging.NOTSET)
