"""The pictures of detections beside ground truth."""

import json
import sys

import cv2
import pytest
import visualize_results

from iou_balanced_d2.model_zoo import get_config_file

from ..engine.test_train_net import forget_own_data


@pytest.fixture
def command(tmp_path, own_data, monkeypatch):
    """Run the tool on own data in this process; extra arguments go before the options."""
    forget_own_data()
    config = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    options = [
        "MODEL.RETINANET.NUM_CLASSES", "2", "DATASETS.TEST", "('own',)",
        "DATASETS.COCO_JSON", repr((("own", *own_data),)), "OUTPUT_DIR", str(tmp_path / "out"),
    ]  # fmt: skip

    def run(*args):
        argv = ["visualize_results.py", "--config-file", config, *args, *options]
        monkeypatch.setattr(sys, "argv", argv)
        return visualize_results.main()

    return run


def test_detections_are_drawn_beside_the_ground_truth(tmp_path, command, capsys):
    detections = [
        {"image_id": 0, "category_id": 9, "bbox": [30, 40, 20, 20], "score": 0.9},
        {"image_id": 0, "category_id": 7, "bbox": [2, 2, 9, 9], "score": 0.1},
    ]
    folder = tmp_path / "out/inference/own"
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps(detections))
    assert command("--num-images", "2") == 0
    pictures = sorted((tmp_path / "out/pictures").iterdir())
    assert [p.name for p in pictures] == ["own_0.png", "own_1.png"]
    images = [cv2.imread(str(p)) for p in pictures]
    assert images[0].shape == (640, 1280, 3), "small images are enlarged"
    # Image 1 has no detection: its left half is the bare image; image 0's is not.
    plain = [cv2.resize(cv2.imread(str(tmp_path / f"images/{i}.png")), (640, 640)) for i in (0, 1)]
    changed = [
        (abs(a[:, :640].astype(int) - b).max(axis=2) > 60).mean()
        for a, b in zip(images, plain, strict=True)
    ]
    assert changed[0] > changed[1] + 0.005
    assert "Pictures" in capsys.readouterr().out


def test_missing_detections_are_one_line(command, capsys):
    assert command() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "coco_instances_results.json not found: train, or evaluate" in message
