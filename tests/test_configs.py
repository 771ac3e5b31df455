"""The shipped configs: what they hold, and that baseline and method differ in the losses alone."""

from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import get_cfg

from iou_balanced_d2.config import add_iou_balanced_config
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.model_zoo import get_config_file

ROOT = Path(__file__).parent.parent
CONFIGS = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")])
METHODS = [path for path in CONFIGS if path.stem.endswith("_iou_balanced")]
ABLATION = "COCO-Detection/retinanet_R_50_FPN_1x_600"
# Detector -> CLS_NORM_SCOPE and NORMALIZER, which are the same with the plain losses and ours.
SCOPES = {
    "IoUBalancedRetinaNet": ("batch", "ema"),
    "IoUBalancedFCOS": ("batch", "ema"),
    "IoUBalancedSSD": ("image", "batch"),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_with_a_safe_loader(path):
    yaml.safe_load(path.read_text())
    assert load_config(str(path)).MODEL.META_ARCHITECTURE in SCOPES


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_method_differs_from_its_baseline_in_the_powers_alone(path):
    cfg = load_config(str(path))
    plain = load_config(str(path).replace("_iou_balanced", ""))
    for each, power in ((cfg, 1.5), (plain, 0.0)):
        keys = each.MODEL.IOU_BALANCED
        assert (keys.CLS_ETA, keys.LOC_LAMBDA, keys.LOC_WEIGHT) == (power, power, 0.0)
        scopes = (keys.CLS_NORM_SCOPE, keys.NORMALIZER)
        assert scopes == SCOPES[each.MODEL.META_ARCHITECTURE]
        keys.CLS_ETA = keys.LOC_LAMBDA = 0.0
    cfg.OUTPUT_DIR = plain.OUTPUT_DIR
    assert cfg == plain


def test_every_config_but_the_bases_and_the_protocols_has_its_pair():
    baselines = {path.with_stem(path.stem.removesuffix("_iou_balanced")) for path in METHODS}
    others = {path.stem for path in CONFIGS if path not in {*METHODS, *baselines}}
    assert others == {"Base-RetinaNet", "Base-FCOS", "Base-SSD300", "Base-SSD512",
                      "retinanet_R_50_FPN_cpu", "retinanet_R_50_FPN_gpu",
                      "retinanet_R_50_FPN_many_cpu",
                      "retinanet_R_50_FPN_1x_quality_focal",
                      "retinanet_R_50_FPN_1x_varifocal"}  # fmt: skip


def test_resnext_has_the_inputs_and_layers_of_detectron2s_weights():
    cfg = load_config(get_config_file("COCO-Detection/retinanet_X_101_32x8d_FPN_1x.yaml"))
    zoo = get_cfg()
    zoo.merge_from_file(
        detectron2_zoo.get_config_file("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml")
    )
    assert cfg.MODEL.WEIGHTS == zoo.MODEL.WEIGHTS
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == (
        zoo.MODEL.PIXEL_MEAN, zoo.MODEL.PIXEL_STD)  # fmt: skip
    zoo.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    assert cfg.MODEL.RESNETS == zoo.MODEL.RESNETS


@pytest.mark.parametrize("rival", ["quality_focal", "varifocal"])
def test_the_rivals_configs_differ_from_the_baseline_in_one_key(rival):
    plain = load_config(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg = load_config(get_config_file(f"COCO-Detection/retinanet_R_50_FPN_1x_{rival}.yaml"))
    assert cfg.MODEL.IOU_BALANCED.CLS_LOSS == rival
    cfg.MODEL.IOU_BALANCED.CLS_LOSS = "iou_balanced"
    cfg.OUTPUT_DIR = plain.OUTPUT_DIR
    assert cfg == plain


@pytest.mark.parametrize("name", ["R_50_FPN_1x", "R_101_FPN_3x"])
def test_baselines_are_the_zoos_but_for_the_papers_knee(name):
    ours = load_config(get_config_file(f"COCO-Detection/retinanet_{name}.yaml"))
    zoo = get_cfg()
    add_iou_balanced_config(zoo)
    zoo.merge_from_file(detectron2_zoo.get_config_file(f"COCO-Detection/retinanet_{name}.yaml"))
    assert ours.MODEL.META_ARCHITECTURE == "IoUBalancedRetinaNet"
    assert ours.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA == 0.11
    assert ours.SOLVER.REFERENCE_WORLD_SIZE == 8
    for cfg in (ours, zoo):
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = 0.0
        cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    del ours.MODEL["IOU_BALANCED"], zoo.MODEL["IOU_BALANCED"]
    assert ours == zoo


def test_the_ablation_config_is_the_papers_set_up():
    cfg = load_config(get_config_file(f"{ABLATION}_iou_balanced.yaml"))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MOMENTUM) == (12, 0.0075, 0.9)
    assert (solver.WARMUP_ITERS, solver.WEIGHT_DECAY, solver.GAMMA) == (500, 1e-4, 0.1)
    assert solver.WARMUP_FACTOR == 1 / 3
    epoch = 117266 / 12
    assert solver.STEPS == (round(8 * epoch), round(11 * epoch))
    assert round(12 * epoch) == solver.MAX_ITER
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((600,), 1000)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (600, 1000)
    assert solver.CLIP_GRADIENTS.CLIP_VALUE == 35.0
