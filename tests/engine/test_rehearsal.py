"""Mistakes in a config are found before the launch, and named by trial."""

import contextlib
import time

import pytest
import yaml

from iou_balanced_d2.arguments import parse
from iou_balanced_d2.config import add_iou_balanced_config  # noqa: F401  (registers detectors)
from iou_balanced_d2.engine import find_placement, load_config, prepare, rehearsal
from iou_balanced_d2.engine.config import flatten
from iou_balanced_d2.engine.rehearsal import check_build, rehearse
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

from ..command import forget_own_data

SSD = "projects/SSD/configs/COCO-Detection/ssd300_VGG16_iou_balanced.yaml"
FCOS = "projects/FCOS/configs/COCO-Detection/fcos_R_50_FPN_1x_iou_balanced.yaml"
# KEY VALUE -> part of the reason.
MISTAKES = {
    "MODEL.ANCHOR_GENERATOR.SIZES [[32],[64]]": "sizes of length 2",
    "MODEL.PIXEL_MEAN [1.0,2.0]": "must match",
    "MODEL.BACKBONE.NAME foo": "No object named 'foo'",
    "MODEL.META_ARCHITECTURE foo": "No object named 'foo'",
    "MODEL.RESNETS.NORM foo": "KeyError: 'foo'; 'BN' works",
    "MODEL.RESNETS.DEPTH 51": "51",
    "MODEL.FPN.OUT_CHANNELS 1000000000": "memory",
    "MODEL.RETINANET.BBOX_REG_WEIGHTS (1.0,)": "expected 4",
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST -1": "out of range",
    "MODEL.DEVICE foo": "device",
    "SOLVER.STEPS (3,2)": "Milestone",
    "SOLVER.STEPS (4,)": "Milestone must be smaller than total number of updates",
    "SOLVER.MAX_ITER 0": "updates",
    "SOLVER.MAX_ITER 1e3": "must be of type int",
    "SOLVER.IMS_PER_BATCH 0": "Total batch size (0)",
    "SOLVER.BASE_LR -0.1": "Invalid learning rate: -0.1",
    "SOLVER.WEIGHT_DECAY_BIAS True": "Boolean alpha",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE foo": "'foo' is not a valid",
    "SOLVER.LR_SCHEDULER_NAME foo": "Unknown LR scheduler",
    "SOLVER.WARMUP_METHOD foo": "Unknown warmup method",
    "SOLVER.CHECKPOINT_PERIOD 0": "ZeroDivisionError",
    "DATALOADER.SAMPLER_TRAIN foo": "Unknown training sampler",
    "DATALOADER.NUM_WORKERS -1": "non-negative",
    "DATALOADER.NUM_WORKERS 1000000000": "must be at most",
    "INPUT.CROP.TYPE foo": "AssertionError; 'relative_range' works",
    "INPUT.RANDOM_FLIP foo": "horiz",
    "INPUT.FORMAT foo": "wrong mode",
    "INPUT.MIN_SIZE_TRAIN ()": "empty",
    "MODEL.LOAD_PROPOSALS True": "needs a file for each of DATASETS.TEST; False works",
    "SEED 99999999999": "Seed must be",
    "TEST.BEST_METRIC bbox/AP57": "did you mean 'bbox/AP",
    "TEST.BEST_METRIC ema/bbox/AP": "did you mean 'bbox/AP'?",
    "TEST.BEST_METRIC validation/total_loss": "needs a TEST.LOSS_PERIOD",
    "TEST.EXPECTED_RESULTS [['bbox','AP']]": "expected 4",
    "DATASETS.TRAIN [['own']]": "expected names",
}  # fmt: skip


@pytest.fixture
def refusal(tmp_path, own_config, monkeypatch):
    """The message of the UserError with which a run with these KEY VALUE words is refused."""
    monkeypatch.chdir(tmp_path)
    forget_own_data()

    def message(*words):
        on = ["INPUT.CROP.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
        args = parse("train", ["--config-file", str(own_config), *on, *words])
        with pytest.raises(UserError) as caught:
            prepare(args, find_placement(args))
        return str(caught.value)

    return message


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_key_is_named_with_its_reason(refusal, tmp_path, mistake):
    key, value = mistake.split(" ")
    message = refusal(key, value)
    assert message.startswith(key)
    assert MISTAKES[mistake] in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_loss_that_the_detector_lacks_is_no_metric(refusal):
    words = ["TEST.LOSS_PERIOD", "2", "TEST.BEST_METRIC", "validation/loss_clss"]
    assert "did you mean 'validation/loss_cls'?" in refusal(*words)


def test_a_mistake_in_the_file_is_undone_by_its_base(tmp_path, own_config, monkeypatch):
    """The toy model's base would not fit ResNet-18 with 256 channels: only the file's own does."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": "own.yaml", "MODEL": {"FPN": {"NORM": "foo"}}}))
    with pytest.raises(UserError, match=r"^MODEL\.FPN\.NORM 'foo' .*; '' works$"):
        check_build(load_config(str(path)), str(path), [], training=True)
    opts = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]
    with pytest.raises(UserError, match=r"RESNETS\.RES2_OUT_CHANNELS = 64 .*; 64 works$"):
        check_build(load_config(str(path.with_name("own.yaml")), opts), "own.yaml", opts,
                    training=True)  # fmt: skip


def test_two_mistakes_are_named_one_after_the_other(refusal):
    words = ["SOLVER.BASE_LR", "-1.0", "SOLVER.STEPS", "(3,2)"]
    assert refusal(*words).startswith("SOLVER.BASE_LR -1.0 can't be used")


def test_a_model_without_end_is_given_up(refusal, monkeypatch):
    monkeypatch.setattr(rehearsal, "_SECONDS", 1)
    message = refusal("MODEL.RETINANET.NUM_CONVS", "10000000")
    assert message.startswith("MODEL.RETINANET.NUM_CONVS 10000000 can't be used")


@rehearsal._time_limit()
def lose_the_first_error():
    with contextlib.suppress(RuntimeError):
        time.sleep(20)
    time.sleep(20)


def test_a_time_limit_whose_error_is_lost_is_raised_again(monkeypatch):
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="takes more than"):
        lose_the_first_error()


@pytest.mark.parametrize("path", [get_config_file(
    "COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml"), SSD, FCOS])  # fmt: skip
def test_configs_are_built_once_and_leave_no_trace(path, monkeypatch):
    import numpy as np
    import torch

    builds = []
    build = rehearsal.build_model
    monkeypatch.setattr(rehearsal, "build_model", lambda cfg: builds.append(cfg) or build(cfg))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    before = flatten(cfg)
    check_build(cfg, str(path), [], training=True, world_size=2)
    assert len(builds) == 1
    assert flatten(cfg) == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_test_time_augmentation_of_ssd_is_of_its_own_size():
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "TEST.AUG.ENABLED", "True"]
    with pytest.raises(UserError, match=r"MODEL\.SSD\.SIZE.*TEST\.AUG\.MIN_SIZES \(300,\)"):
        rehearse(load_config(str(SSD), opts), training=False)
    rehearse(load_config(str(SSD), [*opts, "TEST.AUG.MIN_SIZES", "(300,)"]), training=False)


def test_evaluation_needs_no_training(own_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(str(own_config), ["SOLVER.STEPS", "(3, 2)", "MODEL.DEVICE", "cpu"])
    rehearse(cfg, training=False)
    with pytest.raises(ValueError, match="Milestone"):
        rehearse(cfg, training=True)


def test_layers_without_a_version_for_the_cpu_are_left_to_the_gpu(own_config, monkeypatch):
    """As detectron2's modulated deformable convolutions."""

    def fails(*_, **__):
        raise NotImplementedError("Deformable Conv is not supported on CPUs!")

    monkeypatch.setattr("detectron2.modeling.FPN.forward", fails)
    cfg = load_config(str(own_config), ["MODEL.DEVICE", "cpu"])
    with pytest.raises(NotImplementedError):
        rehearse(cfg, training=True)
    cfg.MODEL.DEVICE = "cuda"
    rehearse(cfg, training=True)
