"""Config files and options: each mistake is one line that names it."""

import logging

import pytest
import torch
from detectron2.config import get_cfg

from iou_balanced_d2.arguments import parse
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.engine.checks import check_launch, check_weights, warn_linear_rule
from iou_balanced_d2.engine.config import choose_device
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

R50 = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml")


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(f"VERSION: 2\n{text}\n")
    return str(path)


def refusal(function, *args, **kwargs):
    """The message of the UserError that the call must raise: one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_options_override_the_file():
    cfg = load_config(R50, ["MODEL.IOU_BALANCED.CLS_ETA", "0.5", "SOLVER.STEPS", "(10, 20)"])
    assert cfg.MODEL.IOU_BALANCED.CLS_ETA == 0.5
    assert cfg.SOLVER.STEPS == (10, 20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MODEL: {IOU_BALANCED: {CLS_ETTA: 1.0}}", "did you mean 'MODEL.IOU_BALANCED.CLS_ETA'?"),
        ("SOLVER: {BASE_LR: fast}", "SOLVER.BASE_LR"),
        ("MODEL: [", "line 3"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml' not found"),
        ("SOLVER: {}\nSEED: 1\nSOLVER: {}", "has the key 'SOLVER' twice, in lines 2 and 4"),
        ("MODEL:\n  FPN:\n    NORM: GN\n    NORM: BN", "'NORM' twice, in lines 4 and 5"),
        ("SEED: !!python/object/apply:eval ['1']", "only plain values are allowed"),
    ],
)
def test_broken_files_are_explained(tmp_path, text, expected):
    path = write(tmp_path, text)
    message = refusal(load_config, path)
    assert path in message
    assert expected in message


def test_a_key_may_be_in_a_base_or_merged_as_well_but_no_file_may_have_it_twice(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("VERSION: 2\nSOLVER: {BASE_LR: 0.5, GAMMA: 0.5}\n")
    text = "_BASE_: base.yaml\nSOLVER: {GAMMA: 0.2}\nTEST: {AUG: {MIN_SIZES: [1, 1]}}"
    cfg = load_config(write(tmp_path, text))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (0.5, 0.2)
    merged = "SOLVER: {GAMMA: 0.2}\nMODEL: {FPN: &f {NORM: GN}, RETINANET: {<<: *f, NORM: BN}}"
    assert load_config(write(tmp_path, merged)).MODEL.RETINANET.NORM == "BN"
    base.write_text("SOLVER: {}\nSOLVER: {}\n")
    assert f"'{base}' has the key 'SOLVER' twice" in refusal(load_config, write(tmp_path, text))


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1", "'MODEL.ANCHOR_GENERATOR.SIZES' is a key of VERSION 2"),
        ("3", "VERSION must be 1 or 2, got 3"),
        ("[1]", "VERSION must be 1 or 2, got [1]"),
        ("two", "VERSION must be 1 or 2, got 'two'"),
    ],
)
def test_the_version_is_named(tmp_path, version, expected):
    path = tmp_path / "config.yaml"
    path.write_text(f"VERSION: {version}\nMODEL: {{ANCHOR_GENERATOR: {{SIZES: [[32]]}}}}\n")
    assert expected in refusal(load_config, str(path))


def test_empty_and_missing_files_are_explained(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert "empty.yaml" in refusal(load_config, str(tmp_path / "empty.yaml"))
    assert "'gone.yaml' not found" in refusal(load_config, "gone.yaml")


def test_unknown_and_unfit_options_are_explained():
    message = refusal(load_config, R50, ["MODEL.RETINANET.NUM_CLASES", "5"])
    assert "did you mean 'MODEL.RETINANET.NUM_CLASSES'?" in message
    assert "SOLVER.BASE_LR" in refusal(load_config, R50, ["SOLVER.BASE_LR", "fast"])


def test_misplaced_flags_and_keys_without_value_are_refused():
    args = parse("train", ["--num-gpus", "4", "--config-file", R50, "SOLVER.BASE_LR", "-1"])
    assert (args.num_gpus, args.opts) == (4, ["SOLVER.BASE_LR", "-1"])
    opts = ["--config-file", R50, "SOLVER.BASE_LR", ".01"]
    assert "--num-gpus must stand before" in refusal(parse, "train", [*opts, "--num-gpus", "4"])
    assert "'.01' is left over" in refusal(
        parse, "train", ["--config-file", R50, "SEED", "1", ".01"]
    )
    assert "--config-file is required" in refusal(parse, "train", [])


def test_default_device_falls_back_to_the_cpu_but_an_explicit_one_does_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = get_cfg()
    choose_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    asked = ["MODEL.DEVICE", "cuda"]
    cfg = load_config(R50, asked)
    assert "no CUDA device" in refusal(choose_device, cfg, asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = get_cfg()
    choose_device(cfg)
    assert cfg.MODEL.DEVICE == "cuda"


def test_batches_that_can_not_be_shared_are_refused():
    launch = {"num_gpus": 1, "num_machines": 1}
    cfg = load_config(R50, ["MODEL.DEVICE", "cpu"])
    check_launch(cfg, **launch)
    cfg.SOLVER.IMS_PER_BATCH = 4
    assert "REFERENCE_WORLD_SIZE 0" in refusal(check_launch, cfg, **launch)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    check_launch(cfg, **launch)
    check_launch(cfg, **{**launch, "num_gpus": 4})  # on a CPU that many processes
    assert "3 processes" in refusal(check_launch, cfg, **{**launch, "num_machines": 3})


def test_processes_need_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = load_config(R50, ["SOLVER.REFERENCE_WORLD_SIZE", "0", "MODEL.DEVICE", "cuda"])
    check_launch(cfg, num_gpus=2, num_machines=1)
    message = refusal(check_launch, cfg, num_gpus=4, num_machines=1)
    assert message == "--num-gpus 4, but this machine has 2 GPU(s) to use"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "--num-gpus 2" in refusal(check_launch, cfg, num_gpus=2, num_machines=1)
    cfg.MODEL.DEVICE = "cuda:1"
    message = refusal(check_launch, cfg, num_gpus=1, num_machines=1)
    assert message == "MODEL.DEVICE 'cuda:1', but this machine has 1 GPU(s) to use"
    cfg.MODEL.DEVICE = "cuda:0"
    check_launch(cfg, num_gpus=1, num_machines=1)
    assert "one GPU" in refusal(check_launch, cfg, num_gpus=1, num_machines=2)


def test_missing_weights_are_named(tmp_path):
    cfg = load_config(R50, ["OUTPUT_DIR", str(tmp_path)])
    check_weights(cfg, resume=False, eval_only=False)
    cfg.MODEL.WEIGHTS = "gone.pth"
    assert "'gone.pth' not found" in refusal(check_weights, cfg, resume=False, eval_only=False)
    cfg.MODEL.WEIGHTS = ""
    check_weights(cfg, resume=False, eval_only=False)
    assert "nothing to evaluate" in refusal(check_weights, cfg, resume=True, eval_only=True)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    for cfg.MODEL.WEIGHTS in ("", "gone.pth"):
        check_weights(cfg, resume=True, eval_only=True)


@pytest.mark.parametrize(
    ("opts", "warned"),
    [
        ([], False),
        (["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.0025"], False),
        (["SOLVER.IMS_PER_BATCH", "4"], True),
        (["SOLVER.IMS_PER_BATCH", "4", "MODEL.WEIGHTS", ""], False),
    ],
)
def test_linear_rule(caplog, opts, warned):
    with caplog.at_level(logging.WARNING):
        warn_linear_rule(load_config(R50, opts))
    assert ("gives 0.0025" in caplog.text) == warned
