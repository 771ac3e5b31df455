"""Fixtures shared by the tests."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def own_data(tmp_path):
    """A data set of one's own: 4 images of one bright square each, 2 classes; its two paths."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for i in range(4):
        image = np.full((64, 64, 3), 40, np.uint8)
        image[10 + i : 40 + i, 8:36] = 220
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), image)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
        annotations.append(
            {"id": i + 1, "image_id": i, "category_id": 7, "bbox": [8, 10 + i, 28, 30],
             "area": 840, "iscrowd": 0}
        )  # fmt: skip
    categories = [{"id": 7, "name": "square"}, {"id": 9, "name": "circle"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return str(tmp_path / "annotations.json"), str(tmp_path / "images")


@pytest.fixture
def own_config(tmp_path, own_data):
    """A config of a user's own: toy model, own data, paths relative to the folder run in."""
    entry = [str(Path(path).relative_to(tmp_path)) for path in own_data]
    content = {
        "_BASE_": str(ROOT / "configs/COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml"),
        "MODEL": {
            "WEIGHTS": "",
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "NORM": "BN"},
            "FPN": {"OUT_CHANNELS": 16},
            "RETINANET": {"NUM_CLASSES": 2, "NUM_CONVS": 1},
        },
        "DATASETS": {"COCO_JSON": [["own", *entry]], "TRAIN": ["own"], "TEST": ["own"]},
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 2, "REFERENCE_WORLD_SIZE": 0, "MAX_ITER": 4, "STEPS": [3]},
        "SEED": 1,
        "OUTPUT_DIR": "out",
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
