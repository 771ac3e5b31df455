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

CONFIGS = Path(__file__).parent.parent / "configs"
BASELINES = [
    "COCO-Detection/retinanet_R_50_FPN_1x",
    "COCO-Detection/retinanet_R_50_FPN_1x_600",
    "COCO-Detection/retinanet_R_101_FPN_1x",
    "COCO-Detection/retinanet_R_101_FPN_3x",
    "PascalVOC-Detection/retinanet_R_50_FPN",
    "PascalVOC-Detection/retinanet_R_101_FPN",
    "Cityscapes-Detection/retinanet_R_50_FPN",
    "Cityscapes-Detection/retinanet_R_101_FPN",
]
POWERS = {"": (0.0, 0.0), "_cls": (1.5, 0.0), "_loc": (0.0, 1.5), "_both": (1.5, 1.5)}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads_with_a_safe_loader(path):
    yaml.safe_load(path.read_text())
    load_config(str(path))


@pytest.mark.parametrize("baseline", BASELINES)
def test_variants_differ_from_the_baseline_in_the_losses_keys_alone(baseline):
    plain = load_config(get_config_file(f"{baseline}.yaml"))
    for variant, powers in POWERS.items():
        suffix = {"": "", "_both": "_iou_balanced"}.get(variant, f"_iou_balanced{variant}")
        cfg = load_config(get_config_file(f"{baseline}{suffix}.yaml"))
        keys = cfg.MODEL.IOU_BALANCED
        assert (keys.CLS_ETA, keys.LOC_LAMBDA, keys.LOC_WEIGHT) == (*powers, 0.0)
        keys.CLS_ETA = keys.LOC_LAMBDA = 0.0
        assert cfg == plain


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
    cfg = load_config(get_config_file(f"{BASELINES[1]}_iou_balanced.yaml"))
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


def test_the_demo_and_its_baseline_differ_in_the_losses_alone():
    plain = load_config(get_config_file("Demo/retinanet_demo.yaml"))
    ours = load_config(get_config_file("Demo/retinanet_demo_iou_balanced.yaml"))
    assert ours.MODEL.IOU_BALANCED.CLS_ETA == ours.MODEL.IOU_BALANCED.LOC_LAMBDA == 1.5
    assert plain.MODEL.IOU_BALANCED.CLS_ETA == plain.MODEL.IOU_BALANCED.LOC_LAMBDA == 0.0
    del plain.MODEL["IOU_BALANCED"], ours.MODEL["IOU_BALANCED"]
    plain.OUTPUT_DIR = ours.OUTPUT_DIR
    assert plain == ours


def test_unknown_config_name_raises_as_in_detectron2():
    with pytest.raises(RuntimeError, match=r"nothing\.yaml not available"):
        get_config_file("nothing.yaml")
