"""Fine-tuning a stock RetinaNet: its configs, its weights, and what becomes of other classes."""

import logging
import pickle

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import RetinaNet
from detectron2.utils.events import EventStorage

from iou_balanced_d2 import model_zoo
from iou_balanced_d2.engine.checkpoint import LossState, RobustCheckpointer, other_classes_message
from iou_balanced_d2.modeling import DetectorInterface

from .command import run
from .toy import toy_batch, toy_config, toy_model

STOCK = ("MODEL.META_ARCHITECTURE", "RetinaNet")
FIRST = ("MODEL.IOU_BALANCED.LOC_WEIGHT_RULE", "first")


def load(name):
    return model_zoo.get_config(f"Fine-Tuning/retinanet_{name}.yaml")


@pytest.mark.parametrize("depth", ["R_50", "R_101"])
def test_configs_start_from_detectron2s_zoo_and_differ_in_the_losses_alone(depth):
    plain, ours = load(f"{depth}_FPN"), load(f"{depth}_FPN_iou_balanced")
    url = detectron2_zoo.get_checkpoint_url(f"COCO-Detection/retinanet_{depth}_FPN_3x.yaml")
    # The zoo's files have two spellings, one of which is read through a mirror if need be.
    assert ours.MODEL.WEIGHTS.removeprefix("detectron2://") == url.split("/detectron2/")[1]
    keys = ours.MODEL.IOU_BALANCED
    assert (keys.CLS_ETA, keys.LOC_LAMBDA, keys.LOC_WEIGHT_RULE) == (1.5, 1.5, "first")
    keys.CLS_ETA = keys.LOC_LAMBDA = 0.0
    assert ours == plain
    zoo = model_zoo.get_config(f"COCO-Detection/retinanet_{depth}_FPN_3x.yaml" if depth == "R_101"
                               else "COCO-Detection/retinanet_R_50_FPN_1x.yaml")  # fmt: skip
    for part in ("RESNETS", "FPN", "RETINANET", "ANCHOR_GENERATOR", "PIXEL_MEAN", "BACKBONE"):
        assert ours.MODEL[part] == zoo.MODEL[part]
    epoch = 117266 / ours.SOLVER.IMS_PER_BATCH
    assert (round(1.5 * epoch),) == ours.SOLVER.STEPS
    assert round(2 * epoch) == ours.SOLVER.MAX_ITER


@pytest.fixture
def stock_checkpoint(tmp_path):
    """What detectron2's RetinaNet of 3 classes writes, whose boxes are those of its anchors."""
    model = toy_model(*STOCK)
    assert type(model) is RetinaNet
    torch.nn.init.normal_(model.head.cls_score.bias, std=0.1)
    torch.nn.init.zeros_(model.head.bbox_pred.weight)
    DetectionCheckpointer(model, str(tmp_path)).save("stock")
    return str(tmp_path / "stock.pth"), model


def test_a_stock_checkpoint_is_loaded_whole_and_w_loc_measured_afresh(stock_checkpoint, caplog):
    path, stock = stock_checkpoint
    model = toy_model(*FIRST)
    with caplog.at_level(logging.WARNING):
        RobustCheckpointer(model, iou_balanced=LossState(model)).resume_or_load(path)
    assert not [
        r for r in caplog.records if "Skip loading" in r.message or "not found" in r.message
    ]
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.iou_balanced_loss.w_loc_measurement.w_loc == 0
    with EventStorage(0):
        model(toy_batch())
    assert model.iou_balanced_loss.w_loc_measurement.w_loc > 1


@pytest.mark.parametrize("heuristics", [False, True])
def test_files_of_the_zoos_form_are_loaded_whole(heuristics, stock_checkpoint, caplog):
    """A pickle of arrays; with heuristics, the model's names may begin with more."""
    path, stock = stock_checkpoint
    prefix = "backbone." if heuristics else ""
    weights = {k.removeprefix(prefix): v.numpy() for k, v in stock.state_dict().items()}
    content = {"model": weights, "__author__": "Detectron2 Model Zoo"}
    if heuristics:
        content["matching_heuristics"] = True
    path = path.removesuffix(".pth") + ".pkl"
    with open(path, "wb") as f:
        pickle.dump(content, f)
    model = toy_model(*FIRST)
    torch.nn.init.zeros_(model.head.cls_score.weight)
    with caplog.at_level(logging.WARNING):
        RobustCheckpointer(model).resume_or_load(path, resume=False)
    assert "not found in the checkpoint" not in caplog.text
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_layers_of_other_classes_start_anew_and_are_named(stock_checkpoint, caplog):
    path, stock = stock_checkpoint
    model = toy_model(*FIRST, "MODEL.RETINANET.NUM_CLASSES", 5)
    fresh = model.head.cls_score.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        RobustCheckpointer(model).resume_or_load(path, resume=False)
    for name in ("head.cls_score.bias", "head.cls_score.weight"):
        assert name in caplog.text
    assert "has 3 classes and this model 5" in caplog.text
    assert "bbox_pred" not in caplog.text
    assert torch.equal(model.head.cls_score.weight, fresh)
    assert torch.equal(model.head.bbox_pred.bias, stock.head.bbox_pred.bias)


class WithBackground(torch.nn.Module, DetectorInterface):
    num_background_scores = 1


def shapes(*first, rest=()):
    """Mismatches of (rows in the checkpoint, rows in the model)."""
    return [(f"layer{i}", [a, *rest], [b, *rest]) for i, (a, b) in enumerate(first)]


def test_the_message_names_layers_and_both_numbers_of_classes():
    model = torch.nn.Module()
    model.num_classes = 5
    told = other_classes_message(model, shapes((720, 45), (720, 45), rest=(16, 3, 3)))
    assert told.startswith("the checkpoint has 80 classes and this model 5 (NUM_CLASSES): layer0, ")
    assert "layer1 can't be loaded and start anew" in told
    # SSD: feature maps of 4 and 6 boxes, each with one more score.
    model = WithBackground()
    model.num_classes = 5
    assert "has 20 classes" in other_classes_message(model, shapes((84, 24), (126, 36)))


def test_layers_that_do_not_fit_for_other_reasons_are_left_to_fvcores_message():
    model = torch.nn.Module()
    assert other_classes_message(model, shapes((720, 45))) == ""
    model.num_classes = 5
    assert other_classes_message(model, []) == ""
    channels = [("fpn", [256, 512, 3, 3], [64, 512, 3, 3])]
    anchors = [("bbox_pred", [36, 256, 3, 3], [12, 256, 3, 3])]
    depth = [("cls_score", [720, 256, 3, 3], [45, 128, 3, 3])]
    for others in (channels, anchors, depth, shapes((720, 45), (20, 15)), [("scale", [], [5])]):
        assert other_classes_message(model, others) == "", others


@pytest.mark.parametrize("num_classes", [1, 2, 7, 80])
def test_numbers_of_classes_are_read_off_the_toys_layers(num_classes):
    model, other = toy_model(), toy_model("MODEL.RETINANET.NUM_CLASSES", num_classes)
    pairs = zip(other.state_dict().items(), model.state_dict().values(), strict=True)
    found = [(name, a.shape, b.shape) for (name, a), b in pairs if a.shape != b.shape]
    assert len(found) == 2
    words = f"has {num_classes} classes and this model {model.num_classes} "
    assert words in other_classes_message(model, found)


def test_train_net_fine_tunes_it(own_config, stock_checkpoint):
    """3 classes in the checkpoint, 2 in the data: told, and trained."""
    steps = ("MODEL.IOU_BALANCED.LOC_WEIGHT_STEPS", 1, "SOLVER.MAX_ITER", 2)
    options = (*FIRST, *steps, "MODEL.WEIGHTS", stock_checkpoint[0])
    args = ("--config-file", own_config, *options, "SOLVER.STEPS", "(1,)")
    code, out, err = run(*args, cwd=own_config.parent)
    assert code == 0, (out + err)[-3000:]
    assert "head.cls_score.weight" in out + err
    assert "w_loc measured" in out


def test_toy_config_has_the_zoos_layers():
    """So that what holds for the toy holds for the zoo's model."""
    assert toy_config().MODEL.FPN.IN_FEATURES == load("R_50_FPN").MODEL.FPN.IN_FEATURES
