"""SSD's augmentation: boxes and pixels stay together, crops keep what they promise."""

import random

import cv2
import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from iou_balanced_d2.data.loading import BoxMapper, build_mapper
from iou_balanced_d2.projects.ssd import augmentation
from iou_balanced_d2.projects.ssd.augmentation import (
    CenterCropTransform,
    RandomExpand,
    RandomIoUCrop,
    build_augmentation,
)

from .ssd_toy import toy_config

BOXES = np.array([[20.0, 30.0, 60.0, 70.0], [90.0, 10.0, 120.0, 50.0], [5.0, 80.0, 30.0, 95.0]])
COLORS = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]


def seed(value):
    np.random.seed(value)
    random.seed(value)


def drawn():
    """A grey image of 100x130 with the boxes filled, each in its colour."""
    image = np.full((100, 130, 3), 128, np.uint8)
    for (x0, y0, x1, y1), color in zip(BOXES.astype(int), COLORS, strict=True):
        image[y0:y1, x0:x1] = color
    return image


def bounds(image, color, tolerance=60):
    """XYXY of the pixels of about this colour."""
    near = np.abs(image.astype(int) - color).sum(axis=2) < tolerance
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def test_expanding_keeps_pixels_and_boxes_together():
    sizes = set()
    for i in range(30):
        seed(i)
        inputs = T.AugInput(drawn(), boxes=BOXES.copy())
        RandomExpand([7.0, 8.0, 9.0])(inputs)
        height, width = inputs.image.shape[:2]
        assert 100 <= height <= 400
        assert 130 <= width <= 520
        sizes.add((height, width))
        for box, color in zip(inputs.boxes, COLORS, strict=True):
            assert bounds(inputs.image, color).tolist() == box.tolist()
        if (height, width) != (100, 130):
            assert inputs.image[0, 0].tolist() in ([7, 8, 9], [128, 128, 128])
            outside = (inputs.image == (7, 8, 9)).all(axis=2).sum()
            assert outside == height * width - 130 * 100
    assert len(sizes) > 8


@pytest.mark.parametrize("min_iou", [0.0, 0.1, 0.5, 0.9])
def test_crops_keep_the_iou_and_the_boxes_pixels(monkeypatch, min_iou):
    monkeypatch.setattr(augmentation, "CROP_IOUS", (min_iou, None))
    crops = 0
    for i in range(40):
        seed(i)
        inputs = T.AugInput(drawn(), boxes=BOXES.copy())
        transform = RandomIoUCrop()(inputs)
        if isinstance(transform, T.NoOpTransform):
            assert inputs.image.shape == (100, 130, 3)
            continue
        crops += 1
        assert isinstance(transform, CenterCropTransform)
        height, width = inputs.image.shape[:2]
        assert (height, width) == (transform.h, transform.w)
        assert 30 <= height <= 100
        assert 39 <= width <= 130
        assert 0.5 <= width / height <= 2
        x0, y0 = transform.x0, transform.y0
        window = np.array([x0, y0, x0 + width, y0 + height])
        kept = inputs.boxes[:, 2] > inputs.boxes[:, 0]
        centers = (BOXES[:, :2] + BOXES[:, 2:]) / 2
        assert kept.tolist() == [
            bool((c >= window[:2]).all() and (c < window[2:]).all()) for c in centers
        ]
        iou = torchvision.ops.box_iou(torch.tensor(window[None]), torch.tensor(BOXES))[0]
        assert iou[torch.tensor(kept)].max() >= min_iou
        assert (inputs.boxes >= 0).all()
        assert (inputs.boxes[:, 2:] <= (width, height)).all()
        for box, color in zip(inputs.boxes[kept], np.array(COLORS)[kept], strict=True):
            assert bounds(inputs.image, color).tolist() == box.tolist()
    # A window that has IoU 0.9 with none of the boxes is never found.
    assert crops > 5 if min_iou < 0.9 else crops == 0


@pytest.fixture
def dataset_dict(tmp_path):
    cv2.imwrite(str(tmp_path / "image.png"), drawn())
    annotations = [
        {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": i}
        for i, box in enumerate(BOXES)
    ]
    annotations.append({**annotations[0], "bbox": [0.0, 0.0, 5.0, 5.0], "iscrowd": 1})
    path = str(tmp_path / "image.png")
    return {"file_name": path, "height": 100, "width": 130, "annotations": annotations}


def test_the_mapper_gives_squares_with_boxes_inside(dataset_dict):
    mapper = build_mapper(toy_config(), is_train=True)
    assert isinstance(mapper, BoxMapper)
    before = str(dataset_dict)
    counts = set()
    for i in range(40):
        seed(i)
        first = mapper(dataset_dict)
        instances = first["instances"]
        assert first["image"].shape == (3, 128, 128)
        assert instances.image_size == (128, 128)
        boxes = instances.gt_boxes.tensor
        assert len(boxes) > 0
        assert (boxes >= 0).all()
        assert (boxes <= 128).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        counts.add(len(boxes))
        seed(i)
        again = mapper(dataset_dict)
        assert again["image"].equal(first["image"])
        assert again["instances"].gt_boxes.tensor.equal(boxes)
    assert counts == {1, 2, 3}
    assert str(dataset_dict) == before


def test_geometry_alone_keeps_the_mappers_boxes_on_their_objects(dataset_dict, monkeypatch):
    """Expanded, cropped, resized and flipped: the class's colour is under its box."""
    cfg = toy_config("INPUT.FORMAT", "BGR")
    mapper = build_mapper(cfg, is_train=True)
    mapper.augmentations.augs = mapper.augmentations.augs[1:]  # colours as they are
    for i in range(30):
        seed(i)
        mapped = mapper(dataset_dict)
        image = mapped["image"].permute(1, 2, 0).numpy()
        instances = mapped["instances"]
        for box, label in zip(instances.gt_boxes.tensor, instances.gt_classes, strict=True):
            found = bounds(image, COLORS[label], tolerance=150)
            assert np.abs(found - box.numpy()).max() < 2.5


def test_without_ssd_aug_and_at_test_time_there_is_resizing_alone(dataset_dict):
    cfg = toy_config("INPUT.SSD_AUG", False)
    assert [type(a) for a in build_augmentation(cfg, True)] == [T.Resize, T.RandomFlip]
    assert [type(a) for a in build_augmentation(toy_config(), False)] == [T.Resize]
    mapped = build_mapper(toy_config(), is_train=False)(dataset_dict)
    assert mapped["image"].shape == (3, 128, 128)
    assert (mapped["height"], mapped["width"]) == (100, 130)
    assert "instances" not in mapped


def test_images_without_objects_pass(dataset_dict):
    dataset_dict["annotations"] = []
    mapper = build_mapper(toy_config(), is_train=True)
    for i in range(5):
        seed(i)
        assert len(mapper(dataset_dict)["instances"]) == 0
