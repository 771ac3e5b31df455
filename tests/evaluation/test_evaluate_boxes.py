"""The evaluator's numbers are pycocotools', and those of its summary."""

import copy

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from iou_balanced_d2.evaluation import coco_metrics, evaluate_boxes

from .by_pycocotools import arrays_by_pycocotools
from .synthetic import arrays_of, coco_of, detections_of, random_case

NAMES = [f"class{i}" for i in range(1, 5)]


def metrics_of(coco, detections, difficult="ignore"):
    ground_truth, found = arrays_of(coco, detections, difficult)
    return coco_metrics(**evaluate_boxes(ground_truth, found), class_names=ground_truth.classes)


@pytest.mark.parametrize("share_difficult", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools(seed, share_difficult):
    coco, detections = random_case(seed, share_difficult=share_difficult)
    expected = arrays_by_pycocotools(coco, detections)
    arrays = evaluate_boxes(*arrays_of(coco, detections))
    for key in ("ap", "recall"):
        np.testing.assert_allclose(arrays[key], expected[key], rtol=0, atol=1e-12)
    assert 0.05 < expected["ap"][:, :3, 0].mean() < 0.95


@pytest.mark.parametrize("seed", range(2))
def test_numbers_are_those_of_pycocotools_summary(seed):
    coco, detections = random_case(seed)
    metrics = metrics_of(copy.deepcopy(coco), copy.deepcopy(detections))
    oracle = COCOeval(coco, coco.loadRes(detections), "bbox")
    oracle.evaluate()
    oracle.accumulate()
    oracle.summarize()
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    expected = [100 * x if x >= 0 else np.nan for x in oracle.stats]
    np.testing.assert_allclose([metrics[n] for n in names], expected, rtol=0, atol=1e-6)
    overall = [metrics[f"AP{t}"] for t in range(50, 100, 5)]
    assert np.mean(overall) == pytest.approx(metrics["AP"])
    assert overall == sorted(overall, reverse=True)
    assert np.mean([metrics[f"AP-{n}"] for n in NAMES[:3]]) == pytest.approx(metrics["AP"])
    assert np.isnan(metrics["AP-class4"]), "there is no object of this class"


def test_names_and_their_order():
    coco = coco_of([(1, 1, (10, 10, 50, 50), {})])
    metrics = metrics_of(coco, detections_of([(1, 1, (10, 10, 50, 43), 0.9)]))
    expected = ["AP", *(f"AP{t}" for t in range(50, 100, 5)), "APs", "APm", "APl"]
    expected += ["AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "AP-class1"]
    assert list(metrics) == expected
    # IoU .86: found at .50 to .85, eight of the ten thresholds. The object is of medium size.
    assert [metrics[f"AP{t}"] for t in range(50, 100, 5)] == pytest.approx([100] * 8 + [0] * 2)
    assert [metrics[n] for n in ("AP", "APm", "AR1", "ARm")] == pytest.approx([80] * 4)
    assert np.isnan([metrics[n] for n in ("APs", "APl", "ARs", "ARl")]).all()


def test_no_detection_at_all_is_zero():
    coco = coco_of([(1, 1, (10, 10, 20, 20), {})], num_classes=2)
    metrics = metrics_of(coco, [])
    assert [metrics[n] for n in ("AP", "AP95", "APs", "AR100", "AP-class1")] == [0] * 5
    assert np.isnan([metrics["APl"], metrics["AP-class2"]]).all()


def test_no_object_at_all_is_nan():
    coco = coco_of([])
    detections = detections_of([(1, 1, (10, 10, 20, 20), 0.5)])
    assert np.isnan(list(metrics_of(coco, detections).values())).all()


DIFFICULT = [(1, 1, (0, 0, 100, 100), {}), (1, 1, (150, 0, 100, 100), {"difficult": 1})]
FOUND = [(1, 1, (0, 0, 100, 100), 0.5), (1, 1, (150, 0, 100, 95), 0.9)]


@pytest.mark.parametrize(
    ("difficult", "detections", "ap50"),
    [
        # Neither right nor wrong, and not missed.
        ("ignore", FOUND, 100),
        ("ignore", FOUND[:1], 100),
        # Any number of detections may lie on it.
        ("ignore", [*FOUND, (1, 1, (150, 0, 100, 90), 0.8)], 100),
        # Within it, but of IoU .4: a crowd would take it, a difficult object does not.
        ("ignore", [*FOUND, (1, 1, (150, 0, 40, 100), 0.8)], 50),
        ("count", FOUND, 100),
        # Recall 1/2 with precision 1: 51 of the 101 points.
        ("count", FOUND[:1], 100 * 51 / 101),
        # A second detection of it is wrong, between the two right ones: 51 points of 1, 50 of 2/3.
        ("count", [*FOUND, (1, 1, (150, 0, 100, 90), 0.8)], 100 * (51 + 50 * 2 / 3) / 101),
        # As if not annotated: the first of the two detections is wrong.
        ("drop", FOUND, 50),
        ("drop", FOUND[:1], 100),
    ],
)
def test_difficult_objects(difficult, detections, ap50):
    coco = coco_of(DIFFICULT)
    metrics = metrics_of(coco, detections_of(detections), difficult)
    assert metrics["AP50"] == pytest.approx(ap50)


def test_crowds_keep_cocos_rule():
    crowd = [DIFFICULT[0], (1, 1, (150, 0, 100, 100), {"difficult": 1, "iscrowd": 1})]
    detections = detections_of([*FOUND, (1, 1, (150, 0, 40, 100), 0.8)])
    assert metrics_of(coco_of(crowd), detections)["AP50"] == pytest.approx(100)


def test_annotations_are_completed():
    """Numbered from 0, without area and iscrowd: detectron2 trains on it, COCOeval would fail."""
    coco = coco_of([(1, 1, (10, 10, 20, 20), {})])
    coco.dataset["annotations"] = [
        {"id": 0, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}
    ]
    detections = detections_of([(1, 1, (10, 10, 20, 20), 0.5)])
    assert metrics_of(coco, detections)["AP"] == pytest.approx(100)


def test_images_named_by_strings():
    """As in detectron2's own VOC: "000012"."""
    coco = coco_of([("000012", 1, (10, 10, 20, 20), {})])
    coco.dataset["images"][0]["id"] = "000012"
    detections = detections_of([("000012", 1, (10, 10, 20, 20), 0.5)])
    assert metrics_of(coco, detections)["AP"] == pytest.approx(100)
