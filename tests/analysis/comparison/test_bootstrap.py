"""AP from matches made once equals pycocotools', also of images that count several times."""

import numpy as np
import pytest

from iou_balanced_d2.analysis.comparison.bootstrap import (
    draw_images,
    matches_of,
    metric_names,
    metrics_of,
    resampled_ap,
)

from ...evaluation.by_pycocotools import metrics_by_pycocotools
from ...evaluation.synthetic import arrays_of, random_case
from ..drawn import draw_detections, draw_truth, duplicated


def metrics_by_us(coco, detections, times):
    matches = matches_of([arrays_of(coco, detections)])
    weights = np.array([times], np.int32)
    names = [c["name"] for c in coco.dataset["categories"]]
    values = metrics_of(resampled_ap(matches, weights))[0]
    return dict(zip(metric_names(names), values, strict=True))


def assert_equal(found, expected):
    values = [expected[name] for name in found]
    np.testing.assert_allclose(list(found.values()), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share_difficult", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_plain_ap_is_that_of_the_evaluator(seed, share_difficult):
    """With crowds, ties, empty images, over 100 boxes in an image, a class without objects."""
    coco, detections = random_case(seed, share_difficult=share_difficult)
    found = metrics_by_us(coco, detections, np.ones(len(coco.imgs), int))
    assert_equal(found, metrics_by_pycocotools(coco, detections))
    assert np.isnan(found["AP-class4"])
    assert 5 < found["AP"] < 95


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_copies_of_images(seed):
    rng = np.random.default_rng(seed)
    if seed % 2:
        coco, detections = random_case(seed, share_difficult=0.2, decimals=15)  # no ties
    else:
        coco = draw_truth(rng, 25, share_crowd=0.1)
        detections = draw_detections(rng, coco, num_wrong=3)
    times = draw_images(len(coco.imgs), 1, rng)[0]
    assert times.max() > 1
    assert times.min() == 0
    found = metrics_by_us(coco, detections, times)
    assert_equal(found, metrics_by_pycocotools(*duplicated(coco, detections, times)))
    assert found != metrics_by_us(coco, detections, np.ones_like(times))


def test_two_data_sets_are_pooled():
    cases = [random_case(seed) for seed in (1, 2)]
    offsets = [0, len(cases[0][0].imgs)]
    matches = matches_of([arrays_of(*case) for case in cases])
    weights = np.ones((1, 2 * offsets[1]), np.int32)
    names = [c["name"] for c in cases[0][0].dataset["categories"]]
    values = metrics_of(resampled_ap(matches, weights))[0]
    joined, detections = cases[0]
    for image in cases[1][0].dataset["images"]:
        joined.dataset["images"].append({**image, "id": image["id"] + offsets[1]})
    for rows, into in ((cases[1][0].dataset["annotations"], joined.dataset["annotations"]),
                       (cases[1][1], detections)):  # fmt: skip
        into += [{**row, "image_id": row["image_id"] + offsets[1]} for row in rows]
    for number, annotation in enumerate(joined.dataset["annotations"], start=1):
        annotation["id"] = number
    joined.createIndex()
    found = dict(zip(metric_names(names), values, strict=True))
    assert_equal(found, metrics_by_pycocotools(joined, detections))


def test_images_are_drawn_with_replacement():
    times = draw_images(50, 400, np.random.default_rng(0))
    assert times.shape == (400, 50)
    assert (times.sum(axis=1) == 50).all()
    # Poisson-like: variance 1 - 1 / 50, and each image as often as the others.
    assert times.var() == pytest.approx(0.98, abs=0.03)
    assert np.abs(times.mean(axis=0) - 1).max() < 0.2


def test_no_detection_is_zero_and_no_object_is_nan():
    coco, _ = random_case(0)
    found = metrics_by_us(coco, [], np.ones(len(coco.imgs), int))
    assert found["AP"] == found["AP-class1"] == 0
    assert np.isnan(found["AP-class4"])
    assert np.isnan(metrics_by_us(coco, [], np.zeros(len(coco.imgs), int))["AP"])
