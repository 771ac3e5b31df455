"""new-config on small data sets: what it writes is read, checked and trained with."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from iou_balanced_d2.commands import new_config, run_command
from iou_balanced_d2.data import register_datasets_of
from iou_balanced_d2.data.anchors import anchor_recall, mean_recall
from iou_balanced_d2.data.coco_format import read_coco_json
from iou_balanced_d2.engine import load_config

from ..command import forget_own_data


@pytest.fixture
def command(tmp_path, own_data, monkeypatch):
    """Run the command on own_data in tmp_path; time and memory are not measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_config, "measure", lambda cfg: (2.0, 1.5))
    (tmp_path / "w.pkl").write_bytes(b"")

    def call(*words):
        flags = ["--output", "my.yaml", "--weights", "w.pkl", "--device", "cpu"]
        return run_command("new-config", [".", *flags, *words])

    return call


def test_a_set_without_splits(command, tmp_path, capsys):
    assert command() == 0
    told = capsys.readouterr().out
    assert "my.yaml written" in told
    assert "Images: train 3, valid 1. Classes: 2 (square, circle)" in told
    assert "about 10 min of training (2.00 s an iteration) and 1.5 GiB of main memory" in told
    for words in ("train --config-file my.yaml SOLVER.MAX_ITER 20", "--seeds 3"):
        assert words in told
        assert words in (tmp_path / "my.yaml").read_text()
    cfg = load_config("my.yaml")
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert str(tmp_path / "w.pkl") == cfg.MODEL.WEIGHTS
    assert (cfg.MODEL.IOU_BALANCED.CLS_ETA, cfg.MODEL.IOU_BALANCED.LOC_LAMBDA) == (1.5, 1.5)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (4, 0.01, 300)
    assert [len(read_coco_json(entry[1])["images"]) for entry in cfg.DATASETS.COCO_JSON] == [3, 1]
    content = read_coco_json(cfg.DATASETS.COCO_JSON[0][1])
    assert mean_recall(anchor_recall(cfg, content)) >= new_config.ENOUGH_RECALL
    before = (tmp_path / "my.yaml").read_text()
    assert command("--overwrite") == 0
    assert (tmp_path / "my.yaml").read_text() == before, "the same photos are held out"


def test_names_of_any_characters(command, tmp_path):
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["categories"][0]["name"] = "a\x85b"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    folder = tmp_path / "\U0001f4f7\x85\x7f"
    folder.mkdir()
    for path in (tmp_path / "annotations.json", tmp_path / "images"):
        path.rename(folder / path.name)
    flags = ["--output", "my.yaml", "--weights", "w.pkl", "--device", "cpu"]
    assert run_command("new-config", [folder.name, *flags]) == 0
    cfg = load_config("my.yaml")
    assert cfg.DATASETS.COCO_JSON[0][2] == str(folder / "images")


def test_time_and_memory_are_measured_quietly(own_config, monkeypatch, caplog):
    """Nothing is said of checkpoints, as none are written."""
    monkeypatch.chdir(own_config.parent)
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
    forget_own_data()
    cfg = load_config(str(own_config))
    cfg.MODEL.DEVICE = "cpu"
    register_datasets_of(cfg)
    seconds, gib = new_config.measure(cfg)
    assert seconds > 0
    assert gib > 0.1
    assert "Checkpoints" not in caplog.text


def test_each_value_has_its_reason(command, tmp_path):
    """Lines that follow each other without a comment share the one above."""
    assert command() == 0
    text = (tmp_path / "my.yaml").read_text()
    for key in ("WEIGHTS", "CLS_ETA", "SIZES", "TEST", "MIN_SIZE_TRAIN", "IMS_PER_BATCH",
                "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):  # fmt: skip
        before = text[: text.index(f" {key}:")].rstrip().splitlines()[-1]
        assert before.lstrip().startswith("# "), key
    assert next(iter(yaml.safe_load(text))) == "_BASE_"


def test_for_a_gpu_that_is_elsewhere(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["--output", "gpu.yaml", "--weights", "w.pkl", "--device", "cuda", "--epochs", "100"]
    assert run_command("new-config", [".", *flags]) == 0
    assert "this machine has no GPU" in capsys.readouterr().out
    cfg = load_config("gpu.yaml")
    assert cfg.MODEL.DEVICE == "cuda"
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.01 * cfg.SOLVER.IMS_PER_BATCH / 16)
    assert cfg.SOLVER.MAX_ITER == 100 * 3 // 8 + 1
    assert list(cfg.SOLVER.STEPS) == [38 * 2 // 3, 38 * 9 // 10]


def test_mistakes_are_one_line_and_leave_no_config(command, tmp_path, capsys):
    for words, message in (
        (["--weights", "no.pkl"], "--weights 'no.pkl' not found"),
        (["--epochs", "0"], "--epochs must be a number above 0, got 0"),
        (["--epochs", "inf"], "--epochs must be a number above 0, got inf"),
    ):
        assert command(*words) == 2
        assert capsys.readouterr().err == f"new_config.py: error: {message}\n"
    content = json.loads((tmp_path / "annotations.json").read_text())
    (tmp_path / "annotations.json").write_text(json.dumps({**content, "annotations": []}))
    assert command() == 2
    assert "no photo to train on has a usable box" in capsys.readouterr().err
    alone = [a for a in content["annotations"] if a["image_id"] == 3]  # the photo held out
    (tmp_path / "annotations.json").write_text(json.dumps({**content, "annotations": alone}))
    assert command() == 2
    assert "no photo to train on has a usable box" in capsys.readouterr().err
    content["images"][2]["file_name"] = "gone.png"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert command() == 2
    assert "missing image: " in capsys.readouterr().err
    assert not (tmp_path / "my.yaml").exists()
    (tmp_path / "my.yaml").write_text("mine")
    assert command() == 2
    assert "--output my.yaml is there already" in capsys.readouterr().err
    assert Path("my.yaml").read_text() == "mine"


def test_what_it_writes_is_trained_with(command, tmp_path, own_data, monkeypatch):
    """The measurement for real, then the dry run that it proposes, on smaller images."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run_command("new-config", [".", "--output", "my.yaml", "--device", "cpu"]) == 0
    text = (tmp_path / "my.yaml").read_text()
    assert "(measured here and now)" in text.replace("\n# ", " ")
    try_ = ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "try", "MODEL.WEIGHTS", "", "SEED", "1"]
    small = ["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", "64"]
    assert run_command("train", ["--config-file", "my.yaml", *try_, *small]) == 0
    assert (tmp_path / "try/model_final.pth").exists()


def test_anchors_meet_the_boxes_of_a_rare_class_too():
    """Of 105 boxes the 5 of the small class would hardly count."""
    cfg = load_config(new_config.get_config_file(new_config.DEVICES["cpu"].base))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (256,), 256
    boxes = [(1, [40, 40, 64, 64])] * 100 + [(2, [100 + i, 100 + i, 18, 18]) for i in range(5)]
    content = {
        "images": [{"id": 1, "width": 256, "height": 256}],
        "annotations": [
            {"image_id": 1, "category_id": k, "bbox": box, "iscrowd": 0} for k, box in boxes
        ],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "platelet"}],
    }
    scale, recalls = new_config.best_anchors(cfg, content)
    assert scale < 1
    assert min(recalls.values()) > 0.75
