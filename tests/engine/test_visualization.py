"""Pictures and histograms of a training, and that they leave it as it is."""

import random
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
    PICTURE_NAME,
    LossHistograms,
    TrainingPictures,
    inference_without_trace,
    visualization_hooks,
)
from iou_balanced_d2.modeling import IoUBalancedLoss

from ..toy import toy_config, toy_inputs, toy_model

NAME = "pictured"


@pytest.fixture
def cfg(tmp_path, own_data):
    """A toy training of 4 steps with random flips, on 4 images of one's own."""
    register_coco_instances(NAME, {}, *own_data)
    yield toy_config(
        "MODEL.RETINANET.NUM_CLASSES", 2, "DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,),
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SEED", 1,
        "SOLVER.REFERENCE_WORLD_SIZE", 0, "OUTPUT_DIR", str(tmp_path / "out"),
    )  # fmt: skip
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


class Keep(HookBase):
    """Keeps what the other hooks have put into the storage, and the losses."""

    def __init__(self):
        self.pictures, self.history, self.caught = [], [], []

    def before_train(self):
        loader = self.trainer._trainer._data_loader_iter

        def read():
            for batch in loader:
                self.caught.append(batch)
                yield batch

        self.trainer._trainer._data_loader_iter_obj = read()

    def after_step(self):
        storage = self.trainer.storage
        self.history.append(storage.latest()["total_loss"][0])
        self.pictures += storage._vis_data
        storage.clear_images()


def train(cfg, *hooks):
    """Train with these hooks alone; returns (trainer, what was kept)."""
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    torch.manual_seed(7)
    np.random.seed(7)
    trainer = Trainer(cfg)
    trainer._hooks = []
    keep = Keep()
    trainer.register_hooks([*hooks, keep])
    trainer.train()
    return trainer, keep


def test_training_is_the_same_bit_for_bit_with_pictures(cfg):
    plain, without = train(cfg)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    pictured, kept = train(cfg, TrainingPictures(2))
    assert len(kept.pictures) == 2, "iterations 0 and 2"
    assert kept.history == without.history
    expected = plain.model.state_dict()
    for name, value in pictured.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_only_the_trainings_own_batches_are_read(cfg):
    _, kept = train(cfg, TrainingPictures(1))
    assert len(kept.caught) == 4
    assert len(kept.pictures) == 4


def test_a_picture_shows_the_batch_and_its_boxes(cfg):
    _, kept = train(cfg, TrainingPictures(4))
    ((name, picture, iteration),) = kept.pictures
    assert (name, iteration) == (PICTURE_NAME, 0)
    image = kept.caught[0][0]["image"].numpy()[::-1]  # BGR
    assert image.shape == (3, 64, 64)
    assert picture.shape == (3, 640, 1280), "small images are enlarged"
    right = picture[:, :, 640:].astype(int)
    off = np.abs(right - image.repeat(10, axis=1).repeat(10, axis=2)).max(axis=0) > 25
    box = 10 * kept.caught[0][0]["instances"].gt_boxes.tensor[0].round()
    x0, y0, x1, y1 = box.int().tolist()
    assert off[y0 + 60 : y1 - 20, x0 - 6 : x0 + 6].any(axis=1).all()
    assert off[y0 + 60 : y1 - 20, x1 - 6 : x1 + 6].any(axis=1).all()
    assert not off[y1 + 20 :].any(), "the picture itself, RGB"


class _Finder(nn.Module):
    """Finds 30 boxes of rising score."""

    def forward(self, inputs):
        from detectron2.structures import Boxes, Instances

        assert list(inputs[0]) == ["image"]
        found = Instances((96, 128))
        found.pred_boxes = Boxes(torch.tensor([[i, 5.0, i + 20, 50.0] for i in range(30)]))
        found.scores, found.pred_classes = torch.arange(30) / 30, torch.ones(30, dtype=torch.int64)
        return [{"instances": found}]


def test_the_best_are_drawn_with_their_names(monkeypatch):
    drawn = []

    def draw(image, boxes, labels, color):
        drawn.append((boxes, labels))
        return image

    monkeypatch.setattr("iou_balanced_d2.engine.visualization._boxes_on", draw)
    hook = TrainingPictures(5, class_names=["cat", "dog", "bird"])
    hook.trainer = type("Fake", (), {"model": _Finder(), "iter": 5})
    with EventStorage() as storage:
        hook.before_step()
        hook._catch(hook.trainer.model, ([toy_inputs(classes=(2,))],))
        hook.after_step()
        assert len(storage._vis_data) == 1
    (boxes, labels), (_, truth) = drawn
    assert labels[0] == "dog 0.97"
    assert len(labels) == 1 + 3, "as many as there are objects, and three more"
    assert boxes[:, 0].tolist() == [29, 28, 27, 26]
    assert truth == ["bird"]


def test_inference_leaves_no_trace():
    model = toy_model()
    model.train()
    model.backbone.bottom_up.eval()  # as a user may
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    states = random.getstate(), np.random.get_state()[1].copy()
    with inference_without_trace(nn.DataParallel(model)) as inner:
        assert inner is model
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3), np.random.rand(3), random.random()
        model([{"image": toy_inputs()["image"]}])
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_modes_come_back_after_an_error():
    model = toy_model()
    with pytest.raises(RuntimeError), inference_without_trace(model):
        raise RuntimeError
    assert model.training


def test_histograms_are_of_the_periods_iterations():
    model = nn.Sequential(IoUBalancedLoss(num_classes=1, box2box_transform=None))
    hook = LossHistograms(3)
    put = []
    for iteration in range(7):
        hook.trainer = type("Fake", (), {"model": model, "iter": iteration})
        with EventStorage(iteration) as storage:
            hook.before_step()
            if model[0].observer is not None:
                model[0].observer({"pos_iou": torch.rand(9), "cls_weight": torch.empty(0)})
                put += [(h["tag"], h["num"], iteration) for h in storage._histograms]
            hook.after_step()
        assert model[0].observer is None
    assert put == [("iou_balanced/pos_iou", 9, i) for i in (0, 3, 6)]


def test_diverged_weights_are_left_out_of_the_histograms():
    hook = LossHistograms(1)
    model = IoUBalancedLoss(num_classes=1, box2box_transform=None)
    hook.trainer = type("Fake", (), {"model": model, "iter": 0})
    hook.before_step()
    with EventStorage() as storage:
        model.observer({"pos_iou": torch.tensor([float("nan"), 1.0])})
        model.observer({"loc_weight": torch.ones(2).half()})
        assert [h["tag"] for h in storage._histograms] == ["iou_balanced/loc_weight"]


def test_hooks_of_vis_period(cfg):
    model = toy_model()
    assert visualization_hooks(cfg, model) == []
    cfg.VIS_PERIOD = 5
    found = visualization_hooks(cfg, model)
    assert [type(hook) for hook in found] == [LossHistograms, TrainingPictures]


def test_two_stage_detectors_draw_by_themselves(cfg):
    cfg.VIS_PERIOD = 5
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.IN_FEATURES = ["p3"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    found = visualization_hooks(cfg, build_model(cfg))
    assert [type(hook) for hook in found] == [LossHistograms]
