"""train_net.py as a user runs it: train, resume, evaluate, and every mistake in one line."""

import json
import sys

import pytest
import torch

from iou_balanced_d2.commands import run_command

from ..command import forget_own_data, run
from ..toy import assert_same_state


def check_console(out, log):
    """What matters is on one screen before the first iteration; the rest is in log.txt."""
    before = out[: out.index("First iteration done in")]
    assert before.count("\n") <= 40
    assert "Data: own: 4 images, 4 boxes, 2 classes (square, circle); evaluated on own" in before
    assert "Schedule: 4 iterations of 2 images (2.0 epochs)" in before
    assert "on cpu; shorter side 64" in before
    assert "box smooth_l1 x w_loc x IoU^1.5, w_loc by the rule 'anchors'" in before
    assert "tensorboard --logdir out" in before
    text = log.read_text()
    assert "\x1b" not in text
    for name in ("Running with full config", "PyTorch built with", "(bbox_subnet)"):
        assert name in text
        assert name not in out


def test_train_resume_and_evaluate(tmp_path, own_config):
    steps = ("MODEL.IOU_BALANCED.LOC_WEIGHT_STEPS", 2)
    code, out, err = run("--config-file", own_config, *steps, cwd=tmp_path)
    assert code == 0, err
    check_console(out, tmp_path / "out/log.txt")
    assert out.count("w_loc measured") == 1
    first = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    assert first["iou_balanced"]["losses"][0]["w_loc_measurement"]["w_loc"] > 1
    assert first["iteration"] == 3
    assert (tmp_path / "out/curves.png").stat().st_size > 5000

    code, out, err = run(
        "--config-file", own_config, "--resume", *steps, "SOLVER.MAX_ITER", 6, cwd=tmp_path
    )
    assert code == 0, err
    assert "Starting training from iteration 4" in out
    assert "w_loc measured" not in out, "w_loc is resumed, not measured again"
    second = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    states = [x["iou_balanced"]["losses"][0] for x in (first, second)]
    measured = [state["w_loc_measurement"] for state in states]
    assert_same_state(*measured)
    # Each image has positives, so two more steps have moved the average of positives on.
    assert states[1]["num_pos_ema"] != states[0]["num_pos_ema"]

    augmented = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 64)"]
    weights = ["MODEL.WEIGHTS", "out/model_final.pth"]
    options = [*weights, *augmented, "TEST.ALIGNMENT_REPORT", True]
    code, out, err = run("--config-file", own_config, "--eval-only", *options, cwd=tmp_path)
    assert code == 0, err
    assert "AP,AP50,AP55,AP60" in out
    assert (tmp_path / "out/tta/inference/own/coco_instances_results.json").exists()
    assert (tmp_path / "out/inference/own/alignment/index.html").exists()
    detections = json.loads(
        (tmp_path / "out/inference/own/coco_instances_results.json").read_text()
    )
    assert isinstance(detections, list)

    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.1]]"]
    code, out, _ = run(
        "--config-file", own_config, "--eval-only", "--resume", *expected, cwd=tmp_path
    )
    assert code == 1
    assert "AP,AP50,AP55,AP60" in out
    assert "Result verification failed" in out


def spoil_json(tmp_path, text):
    (tmp_path / "annotations.json").write_text(text)


def edit_json(tmp_path, change):
    content = json.loads((tmp_path / "annotations.json").read_text())
    change(content)
    (tmp_path / "annotations.json").write_text(json.dumps(content))


def spoiled(function, *args):
    """An entry of BAD_INPUT that changes files of the data set, given its folder."""
    return lambda folder: function(folder, *args)


# What is wrong -> (options, change of the files, what the message must say).
BAD_INPUT = {
    "missing config": (["--config-file", "gone.yaml"], None, "'gone.yaml' not found"),
    "unknown key": (
        ["MODEL.IOU_BALANCED.LOC_LAMDA", "1"],
        None,
        "did you mean 'MODEL.IOU_BALANCED.LOC_LAMBDA'",
    ),
    "unknown detector": (
        ["MODEL.META_ARCHITECTURE", "IoUBalanced"],
        None,
        "MODEL.META_ARCHITECTURE 'IoUBalanced'",
    ),
    "flag after options": (["SEED", "1", "--resume"], None, "--resume must stand before"),
    "negative power": (
        ["MODEL.IOU_BALANCED.CLS_ETA", "-1.5"],
        None,
        "MODEL.IOU_BALANCED.CLS_ETA must be",
    ),
    "unknown scope": (
        ["MODEL.IOU_BALANCED.CLS_NORM_SCOPE", "all"],
        None,
        "MODEL.IOU_BALANCED.CLS_NORM_SCOPE must be one of",
    ),
    "unknown box loss": (
        ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "l7"],
        None,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE 'l7' can't be used",
    ),
    "classes that do not fit": (
        ["MODEL.RETINANET.NUM_CLASSES", "80"],
        None,
        "has 2 classes (square, circle): set it to 2",
    ),
    "unknown data set": (["DATASETS.TRAIN", "('owm',)"], None, "did you mean 'own'?"),
    "no data set": (["DATASETS.TRAIN", "()"], None, "DATASETS.TRAIN is empty"),
    "name taken": (
        ["DATASETS.COCO_JSON", "(('coco_2017_val','a','b'),)"],
        None,
        "'coco_2017_val' is taken",
    ),
    "half an entry": (
        ["DATASETS.COCO_JSON", "(('own',),)"],
        None,
        "expected [name, json file, image folder]",
    ),
    "COCO not there": (
        ["DATASETS.TRAIN", "('coco_2017_val',)"],
        None,
        "set the environment variable DETECTRON2_DATASETS",
    ),
    "missing weights": (["MODEL.WEIGHTS", "gone.pth"], None, "'gone.pth' not found"),
    "no JSON": ([], lambda p: (p / "annotations.json").unlink(), "annotations.json: can't be read"),
    "broken JSON": ([], spoiled(spoil_json, "{"), "annotations.json: not a JSON file"),
    "not COCO": ([], spoiled(spoil_json, "[]"), "not in COCO format: it has no list 'images'"),
    "odd COCO": (
        [],
        spoiled(spoil_json, '{"images": [{"id": 1}]}'),
        "images[0] has no 'file_name'",
    ),
    "odd box": (
        [],
        lambda p: edit_json(p, lambda c: c["annotations"][2].update(bbox=[1, 2, None, 4])),
        "annotations[2]: bbox must be 4 numbers (x, y, width, height), got [1, 2, None, 4]",
    ),
    "no image folder": (
        [],
        lambda p: (p / "images").rename(p / "moved"),
        "image folder 'images' not found",
    ),
    "no image": (
        [],
        lambda p: (p / "images/0.png").unlink(),
        "annotations.json: 1 x missing image: images/0.png",
    ),
    "output is a file": (
        ["OUTPUT_DIR", "own.yaml/out"],
        None,
        "OUTPUT_DIR 'own.yaml/out' can't be written",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, own_config, case, monkeypatch, capsys):
    """In this process, as each start of Python with torch takes seconds; one case runs for real."""
    options, spoil, expected = BAD_INPUT[case]
    flags = (
        options
        if options[:1] == ["--config-file"]
        else ["--config-file", str(own_config), *options]
    )
    if spoil:
        spoil(tmp_path)
    before = _without_cache(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_net.py", *flags])
    forget_own_data()
    assert run_command("train") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("train_net.py: error: ")
    assert expected in message
    assert _without_cache(tmp_path) == before


def _without_cache(folder):
    """All files but the converted annotations, which stand beside those of the user."""
    return sorted(p for p in folder.rglob("*") if "iou_balanced_cache" not in p.parts)


def test_bad_input_ends_the_process_with_code_2(tmp_path, own_config):
    code, out, err = run("--config-file", own_config, "SEED", "1", "--num-gpus", "4", cwd=tmp_path)
    assert code == 2
    assert "error: --num-gpus must stand before the KEY VALUE options" in err.splitlines()[-1]
    assert out == ""
    assert not (tmp_path / "out").exists()
