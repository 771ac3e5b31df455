"""In the trainers of other people: what works, and what they are told."""

import logging
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from torch import nn

from iou_balanced_d2 import add_iou_balanced_config
from iou_balanced_d2.config.description import config_help
from iou_balanced_d2.engine import Trainer, TrainerMixin, load_config
from iou_balanced_d2.engine.config import flatten
from iou_balanced_d2.engine.mixin import TRAINER_KEYS
from iou_balanced_d2.modeling import IoUBalancedLoss

from ..command import forget_own_data
from ..toy import THIN

GUIDE = (Path(__file__).parents[2] / "docs/config.md").read_text()


class Mine(TrainerMixin, DefaultTrainer):
    pass


@pytest.fixture
def cfg(tmp_path, own_config, monkeypatch):
    """A training that logs once and is not evaluated."""
    monkeypatch.chdir(tmp_path)
    forget_own_data()
    (tmp_path / "out").mkdir()
    words = [
        *THIN, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 20, "SOLVER.STEPS", (1,),
        "MODEL.IOU_BALANCED.LOC_WEIGHT_STEPS", 1, "DATASETS.TEST", (),
    ]  # fmt: skip
    return load_config(str(own_config), list(map(str, words)))


def state_of(trainer):
    return next(m for m in trainer.model.modules() if isinstance(m, IoUBalancedLoss))


def test_w_loc_is_saved_and_resumed_by_the_mixin(cfg, tmp_path, caplog):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    trainer = Mine(cfg)
    trainer.train()
    assert "don't hold the losses' state" not in caplog.text
    assert "has no effect" not in caplog.text
    w_loc = state_of(trainer).w_loc_measurement.w_loc
    assert w_loc > 1
    saved = torch.load(tmp_path / "out/model_final.pth", weights_only=True)["iou_balanced"]
    assert saved["losses"][0]["w_loc_measurement"]["w_loc"] == w_loc
    again = Mine(cfg)
    again.resume_or_load(resume=True)
    assert state_of(again).w_loc_measurement.w_loc == w_loc


def test_losses_that_the_detector_does_not_have_are_told(cfg, caplog):
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    Mine(cfg)
    assert "MODEL.IOU_BALANCED.LOC_WEIGHT_STEPS has no effect: RetinaNet has" in caplog.text


@pytest.mark.parametrize("clip_type", ["value", "full_model"])
def test_the_optimizer_is_that_of_the_trainer_that_is_extended(cfg, clip_type):
    class WithAdam(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return torch.optim.AdamW(model.parameters(), 1e-4)

    class Both(TrainerMixin, WithAdam):
        pass

    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    optimizer = Both.build_optimizer(cfg, nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.AdamW
    assert len(optimizer._optimizer_step_pre_hooks) == (clip_type == "full_model")


def test_data_sets_of_the_config_are_there_without_a_training(cfg):
    for trainer in (Mine, Trainer):
        forget_own_data()
        assert len(trainer.build_test_loader(cfg, "own").dataset) == 4
    forget_own_data()
    assert next(iter(Trainer.build_train_loader(cfg)))
    forget_own_data()
    Trainer(cfg)


def test_an_average_needs_no_call_of_resume_or_load(cfg, tmp_path):
    cfg.MODEL.EMA.ENABLED, cfg.SOLVER.MAX_ITER = True, 2
    Trainer(cfg).train()
    assert (tmp_path / "out/model_ema.pth").exists()


def test_keys_that_are_not_read_are_named(cfg, caplog):
    cfg.MODEL.EMA.ENABLED = True
    cfg.TEST.BEST_METRIC = "bbox/AP"
    cfg.TEST.LOSS_PERIOD = 3
    with caplog.at_level(logging.WARNING):
        Mine(cfg)
    told = re.findall(r"^(\S+) .* has no effect here", caplog.text.replace(" WARNING", ""), re.M)
    assert len([m for m in caplog.messages if "has no effect here" in m]) == 3, told
    assert any(m.startswith("TEST.BEST_METRIC 'bbox/AP' has no effect") for m in caplog.messages)


def test_detectron2s_trainer_is_told_what_it_lacks(cfg, caplog, monkeypatch):
    # As in a new process: nothing has been logged.
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
    from iou_balanced_d2.data import register_datasets_of

    register_datasets_of(cfg)
    trainer = DefaultTrainer(cfg)
    trainer.train()
    assert caplog.text.count("don't hold the losses' state") == 1


def test_a_runs_config_is_read_with_two_lines(cfg, tmp_path):
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_iou_balanced_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_the_guide_says_of_each_key_which_trainer_it_needs():
    table = GUIDE.split("## In other trainers")[1].split("## ")[0]
    keys = {key.partition(" ")[0] for key in re.findall(r"`([A-Z_]+\.?[^`]*)`", table)}
    known = flatten(load_defaults())
    for item in config_help():
        family = ".".join(item.key.split(".")[:2]) + ".…"
        assert item.key in keys or family in keys, item.key
    assert set(TRAINER_KEYS) <= keys & set(known)


def load_defaults():
    cfg = get_cfg()
    add_iou_balanced_config(cfg)
    return cfg


def test_a_detector_without_these_losses_is_as_good():
    class Plain:
        def __init__(self, cfg):
            self.model = nn.Linear(1, 1)
            self.checkpointer = self
            self.added = {}

        def add_checkpointable(self, name, state):
            self.added[name] = state.state_dict()

    trainer = type("Both", (TrainerMixin, Plain), {})(load_defaults())
    assert trainer.added == {"iou_balanced": {"losses": []}}
