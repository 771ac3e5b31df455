"""Fixtures shared by the tests."""

import json

import cv2
import numpy as np
import pytest
import torch


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
