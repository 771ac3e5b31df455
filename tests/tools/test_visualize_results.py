"""The pictures of detections beside ground truth."""

import json
import sys

import cv2
import numpy as np
import pytest

from iou_balanced_d2.commands import run_command
from iou_balanced_d2.commands.visualize_results import MAX_SIDE, picture_scale
from iou_balanced_d2.model_zoo import get_config_file

from ..command import forget_own_data


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
        return run_command("visualize")

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
    assert images[0].shape == (672, 1280, 3), "small images are enlarged"
    # Below row 45 both images are plain grey, but for the detection drawn on the first one.
    drawn = [(image[482:, :640] != 40).any(axis=2).sum() for image in images]
    assert drawn[0] > 500
    assert drawn[1] == 0
    for half in (images[1][:32, :640], images[1][:32, 640:]):  # "detections", "ground truth"
        assert 0.02 < (half < 128).mean() < 0.5
    assert "Pictures" in capsys.readouterr().out


def test_narrow_and_huge_photos_are_not_drawn_without_limit():
    for shape in ((900, 8, 3), (100_000, 30_000, 3)):
        image = np.broadcast_to(np.uint8(0), shape)
        assert max(shape) * picture_scale(image) == pytest.approx(MAX_SIDE)


def test_missing_detections_are_one_line(command, capsys):
    assert command() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "coco_instances_results.json not found: train, or evaluate" in message


def test_broken_files_are_one_line(tmp_path, command, capsys):
    """Half a file of detections, one of another data set's, and a broken photo."""
    results = tmp_path / "out/inference/own/coco_instances_results.json"
    results.parent.mkdir(parents=True)

    def message(content):
        results.write_text(content)
        assert command() == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("visualize_results.py: error: ")
        return error

    detection = {"image_id": 0, "category_id": 8, "bbox": [30, 40, 20, 20], "score": 0.9}
    assert f"{results}: not a JSON file" in message(json.dumps([detection])[:40])
    assert "images/0.png' is of category_id 8, which data set 'own' lacks" in message(
        json.dumps([detection])
    )
    (tmp_path / "images/1.png").write_bytes(b"no picture")
    assert "images/1.png' can't be used: cannot identify image file" in message("[]")
