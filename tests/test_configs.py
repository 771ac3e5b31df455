"""The shipped configs: what they hold, and that baseline and method differ in the losses alone."""

from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import get_cfg

from iou_balanced_d2.config import add_iou_balanced_config
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.model_zoo import get_config_file
from iou_balanced_d2.projects import add_project_configs

ROOT = Path(__file__).parent.parent
ABLATION = "COCO-Detection/retinanet_R_50_FPN_1x_600"
# Every baseline that has a config for each of the losses, by its name in the model zoo.
BASELINES = [
    "COCO-Detection/retinanet_R_50_FPN_1x",
    ABLATION,
    "COCO-Detection/retinanet_R_101_FPN_1x",
    "COCO-Detection/retinanet_R_101_FPN_3x",
    "PascalVOC-Detection/retinanet_R_50_FPN",
    "PascalVOC-Detection/retinanet_R_101_FPN",
    "Cityscapes-Detection/retinanet_R_50_FPN",
    "Cityscapes-Detection/retinanet_R_101_FPN",
    "FCOS/COCO-Detection/fcos_R_50_FPN_1x",
    "SSD/COCO-Detection/ssd300_VGG16",
    "SSD/COCO-Detection/ssd512_VGG16",
    "SSD/PascalVOC-Detection/ssd300_VGG16",
    "SSD/PascalVOC-Detection/ssd512_VGG16",
    "SSD/Own/ssd300_R_50",
]
# Those that have one for both losses only.
PAIRS = [
    "Demo/retinanet_demo",
    "FCOS/Demo/fcos_demo",
    "Fine-Tuning/retinanet_R_50_FPN",
    "Fine-Tuning/retinanet_R_101_FPN",
]
BOTH = {"_iou_balanced": (1.5, 1.5)}
POWERS = {**BOTH, "_iou_balanced_cls": (1.5, 0.0), "_iou_balanced_loc": (0.0, 1.5)}
VARIANTS = [(name, POWERS) for name in BASELINES] + [(name, BOTH) for name in PAIRS]
# Detector -> CLS_NORM_SCOPE and NORMALIZER, which are the same with the plain losses and ours.
SCOPES = {
    "IoUBalancedRetinaNet": ("batch", "ema"),
    "IoUBalancedFCOS": ("batch", "ema"),
    "IoUBalancedSSD": ("image", "batch"),
}


def config_files():
    for pattern in ("configs/**/*.yaml", "projects/*/configs/**/*.yaml"):
        yield from sorted(ROOT.glob(pattern))


@pytest.mark.parametrize("path", list(config_files()), ids=lambda p: p.stem)
def test_every_config_loads_with_a_safe_loader(path):
    yaml.safe_load(path.read_text())
    assert load_config(str(path)).MODEL.META_ARCHITECTURE in SCOPES


@pytest.mark.parametrize(("baseline", "powers"), VARIANTS, ids=[name for name, _ in VARIANTS])
def test_variants_differ_from_the_baseline_in_the_losses_keys_alone(baseline, powers):
    plain = load_config(get_config_file(f"{baseline}.yaml"))
    for suffix, expected in {"": (0.0, 0.0), **powers}.items():
        cfg = load_config(get_config_file(f"{baseline}{suffix}.yaml"))
        keys = cfg.MODEL.IOU_BALANCED
        assert (keys.CLS_ETA, keys.LOC_LAMBDA, keys.LOC_WEIGHT) == (*expected, 0.0)
        scopes = (keys.CLS_NORM_SCOPE, keys.NORMALIZER)
        assert scopes == SCOPES[cfg.MODEL.META_ARCHITECTURE]
        keys.CLS_ETA = keys.LOC_LAMBDA = 0.0
        cfg.OUTPUT_DIR = plain.OUTPUT_DIR
        assert cfg == plain


@pytest.mark.parametrize("rival", ["quality_focal", "varifocal"])
def test_the_rivals_configs_differ_from_the_baseline_in_one_key(rival):
    plain = load_config(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg = load_config(get_config_file(f"COCO-Detection/retinanet_R_50_FPN_1x_{rival}.yaml"))
    assert cfg.MODEL.IOU_BALANCED.CLS_LOSS == rival
    cfg.MODEL.IOU_BALANCED.CLS_LOSS = "iou_balanced"
    cfg.OUTPUT_DIR = plain.OUTPUT_DIR
    assert cfg == plain


def test_every_config_of_the_losses_is_compared_with_its_baseline():
    compared = {get_config_file(f"{name}{s}.yaml") for name, powers in VARIANTS for s in powers}
    assert compared == {str(path) for path in config_files() if "_iou_balanced" in path.stem}


@pytest.mark.parametrize("name", ["R_50_FPN_1x", "R_101_FPN_3x"])
def test_baselines_are_the_zoos_but_for_the_papers_knee(name):
    ours = load_config(get_config_file(f"COCO-Detection/retinanet_{name}.yaml"))
    zoo = get_cfg()
    add_iou_balanced_config(zoo)
    add_project_configs(zoo)
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


def test_unknown_config_name_raises_as_in_detectron2():
    with pytest.raises(RuntimeError, match=r"nothing\.yaml not available"):
        get_config_file("nothing.yaml")
