"""Pictures and histograms of a training, and that they leave it as it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from iou_balanced_d2.engine.trainer import Trainer
from iou_balanced_d2.engine.visualization import (
    LossHistograms,
    VisualizeTraining,
    visualization_hooks,
)
from iou_balanced_d2.modeling import IoUBalancedLoss

from ..projects.ssd_toy import toy_model as toy_ssd
from ..projects.test_fcos import tiny_fcos as toy_fcos
from ..toy import THIN, toy_config, toy_inputs, toy_model

NAME = "pictured"


@pytest.fixture
def cfg(tmp_path, own_data):
    """A toy training of 4 steps with random flips, on 4 images of one's own."""
    register_coco_instances(NAME, {}, *own_data)
    yield toy_config(
        *THIN, "MODEL.RETINANET.NUM_CLASSES", 2,
        "DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,),
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SEED", 1,
        "SOLVER.REFERENCE_WORLD_SIZE", 0, "OUTPUT_DIR", str(tmp_path / "out"),
    )  # fmt: skip
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


class Batch:
    """Stands for the trainer of steps."""

    def __init__(self, batch):
        self.batch = batch


class Keep(HookBase):
    """Keeps the pictures, the losses and the batches, which are not random here but by SEED."""

    def __init__(self):
        self.pictures, self.history, self.batches = [], [], []

    def after_step(self):
        storage = self.trainer.storage
        self.history.append(storage.latest()["total_loss"][0])
        self.batches.append(self.trainer._trainer.batch)
        self.pictures += storage._vis_data
        storage.clear_images()
        storage.clear_histograms()


def train(cfg, *words):
    """Train with the hooks of VIS_PERIOD alone; returns (trainer, what was kept)."""
    cfg = cfg.clone()
    cfg.merge_from_list(words)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    torch.manual_seed(7)
    trainer = Trainer(cfg)
    keep = Keep()
    trainer._hooks = []
    trainer.register_hooks([*visualization_hooks(cfg, trainer.model), keep])
    trainer.train()
    return trainer, keep


def test_training_is_the_same_bit_for_bit_with_pictures(cfg):
    plain, without = train(cfg)
    pictured, kept = train(cfg, "VIS_PERIOD", 2)
    assert [iteration for _, _, iteration in kept.pictures] == [0, 2]
    assert without.pictures == []
    assert kept.history == without.history
    expected = plain.model.state_dict()
    for name, value in pictured.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_picture_shows_the_batch_and_its_boxes(cfg):
    _, kept = train(cfg, "VIS_PERIOD", 4)
    ((_, picture, iteration),) = kept.pictures
    assert iteration == 0
    image = kept.batches[0][0]["image"].numpy()[::-1]  # BGR
    assert picture.shape == (3, 128, 64), "truth above, predictions below"
    off = np.abs(picture[:, :64].astype(int) - image).max(axis=0) > 25
    x0, y0, x1, y1 = kept.batches[0][0]["instances"].gt_boxes.tensor[0].round().int().tolist()
    assert off[y0 + 2 : y1 - 2, x0 - 1 : x0 + 2].any(axis=1).all()
    assert off[y0 + 2 : y1 - 2, x1 - 2 : x1 + 2].any(axis=1).all()
    assert not off[y1 + 4 :].any(), "the picture itself, RGB"


@pytest.mark.parametrize("build", [toy_model, toy_ssd, toy_fcos])
def test_every_dense_detector_draws_what_it_finds(build, monkeypatch):
    """By detectron2's own method, with the boxes that the detector gives in inference."""
    model, inputs = build(), toy_inputs(size=(128, 128))
    hook = VisualizeTraining(toy_config("VIS_PERIOD", 3), model)
    calls, visualize = [], model.visualize_training
    monkeypatch.setattr(
        model, "visualize_training", lambda *args: (calls.append(args), visualize(*args))
    )
    with EventStorage() as storage:
        for iteration in (2, 3):
            hook.trainer = type("T", (), {"iter": iteration, "_trainer": Batch([inputs])})
            hook.after_step()
        assert len(storage._vis_data) == 1
    ((batch, (found,)),) = calls
    assert batch == [inputs]
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = model([{"image": inputs["image"]}])[0]["instances"]
    assert len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_histograms_are_of_the_periods_iterations():
    model = nn.Sequential(IoUBalancedLoss(num_classes=1, box2box_transform=None))
    hook = LossHistograms(3, model)
    put = []
    for iteration in range(7):
        hook.trainer = type("Fake", (), {"iter": iteration})
        with EventStorage(iteration) as storage:
            hook.before_step()
            if model[0].observer is not None:
                model[0].observer({"pos_iou": torch.rand(9), "cls_weight": torch.empty(0)})
                put += [(h["tag"], h["num"], iteration) for h in storage._histograms]
            hook.after_step()
        assert model[0].observer is None
    assert put == [("iou_balanced/pos_iou", 9, i) for i in (0, 3, 6)]


def test_diverged_weights_are_left_out_of_the_histograms():
    model = IoUBalancedLoss(num_classes=1, box2box_transform=None)
    hook = LossHistograms(1, model)
    hook.trainer = type("Fake", (), {"iter": 0})
    hook.before_step()
    with EventStorage() as storage:
        model.observer({"pos_iou": torch.tensor([float("nan"), 1.0])})
        model.observer({"loc_weight": torch.ones(2).half()})
        assert [h["tag"] for h in storage._histograms] == ["iou_balanced/loc_weight"]


def test_hooks_of_vis_period(cfg):
    model = toy_model()
    assert visualization_hooks(cfg, model) == []
    cfg.VIS_PERIOD = 5
    found = visualization_hooks(cfg, nn.DataParallel(model))
    assert [type(hook) for hook in found] == [LossHistograms, VisualizeTraining]


def test_two_stage_detectors_draw_by_themselves(cfg):
    cfg.VIS_PERIOD = 5
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.IN_FEATURES = ["p3"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    found = visualization_hooks(cfg, build_model(cfg))
    assert [type(hook) for hook in found] == [LossHistograms]
