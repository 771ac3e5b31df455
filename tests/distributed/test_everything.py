"""All options of a training together, in two processes, one without an image to evaluate."""

import json
import re

import pytest
import torch

from ..command import run

WORDS = [
    "MODEL.DEVICE", "cpu", "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5,
    "TEST.EVAL_PERIOD", 2, "TEST.LOSS_PERIOD", 2, "TEST.BEST_METRIC", "validation/total_loss",
    "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)", "VIS_PERIOD", 2,
    "DATASETS.TEST", "('one',)", "DATALOADER.NUM_WORKERS", 1,
]  # fmt: skip


@pytest.fixture
def one_image(tmp_path, own_config):
    """Besides the data to train on a set "one" of a single image; words that name both."""
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    (tmp_path / "one.json").write_text(json.dumps(content))
    sets = [
        (name, f"{file}.json", "images") for name, file in (("own", "annotations"), ("one",) * 2)
    ]
    return ["DATASETS.COCO_JSON", str(tuple(sets))]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.slow
def test_everything_at_once_in_two_processes(tmp_path, own_config, one_image):
    """TEST.EXPECTED_RESULTS are missed: exit code 1, and no other error."""
    words = ["--num-gpus", 2, "--dist-timeout", 120, "--config-file", own_config]
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.1]]"]
    code, out, err = run(*words, *one_image, *WORDS, *expected, cwd=tmp_path)
    assert code == 1, err
    assert "error:" not in err
    assert "Traceback" not in out + err
    assert out.count("Saving checkpoint to") == out.count("Saving checkpoint to out/") >= 2
    folder = tmp_path / "out"
    logged = lines(folder)
    assert len({x["iteration"] for x in logged}) == len(logged), "nothing is logged twice"
    assert {"bbox/AP", "ema/bbox/AP", "validation/total_loss"} <= set().union(*logged)
    assert json.loads((folder / "model_best.json").read_text())["iteration"] in (1, 3)
    state = torch.load(folder / "model_final.pth", weights_only=True)
    assert state["iteration"] == 3
    assert set(state) >= {"ema", "data", "iou_balanced"}
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1

    code, out, err = run("--eval-only", "--resume", *words, *one_image, *WORDS, cwd=tmp_path)
    assert code == 0, err
    assert len(re.findall(r"copypaste: AP,", out)) == 3, "of the weights, augmented, of the average"
    for kind in ("", "ema", "tta"):
        assert (folder / kind / "inference/one/coco_instances_results.json").exists()
