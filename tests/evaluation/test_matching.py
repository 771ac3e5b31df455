"""The matcher is pycocotools' to the last bits, and that of plain loops."""

from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from iou_balanced_d2.analysis.comparison.bootstrap import (
    matches_of,
    metric_names,
    metrics_of,
    resampled_ap,
)
from iou_balanced_d2.evaluation.matching import (
    RIGHT,
    WRONG,
    best_iou,
    evaluate_boxes,
    find_pairs,
    match,
)

from .by_pycocotools import arrays_by_pycocotools, metrics_by_pycocotools, prepare_ground_truth
from .synthetic import arrays_of, coco_of, detections_of, one_by_one, random_case

# Sizes on and beside the limits of the ranges of area; IoUs of such boxes lie on thresholds, too.
SIZES = [0, 8, 10, 16, 20, 31.9, 32, 64, 96, 100.3, 128]
BOXES = st.tuples(*[st.integers(0, 12).map(lambda i: i * 2.5)] * 2, *[st.sampled_from(SIZES)] * 2)
IMAGES, CATEGORIES = [30, 4, 17, 2], [9, 0, 5]  # in the file's order
PLACES = st.fixed_dictionaries(
    {"image_id": st.sampled_from(IMAGES), "category_id": st.sampled_from(CATEGORIES)}
)
PLACE = {"image_id": 30, "category_id": 9}
AREAS = st.sampled_from([None, 0, 32**2, 32**2 + 1e-9, 96**2, 1e10, 2e10, -1])
OBJECTS = st.lists(
    st.tuples(PLACES, BOXES, AREAS, *[st.sampled_from([0, 0, 0, 1])] * 2), max_size=14
)
DETECTIONS = st.lists(st.tuples(PLACES, BOXES, st.sampled_from([0.1, 0.3, 0.5, 0.9])), max_size=25)


def dataset_of(objects):
    annotations = [
        {"id": i, **place, "bbox": list(box), "iscrowd": crowd, "difficult": difficult}
        | ({} if area is None else {"area": area})
        for i, (place, box, area, crowd, difficult) in enumerate(objects, start=1)
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 99, "width": 99} for i in IMAGES],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class{i}"} for i in CATEGORIES],
    }


def coco_by(dataset, policy):
    coco = COCO()
    coco.dataset = dataset
    prepare_ground_truth(coco, policy)
    return coco


@settings(max_examples=150, deadline=None)
@given(OBJECTS, DETECTIONS, st.sampled_from([1, 2, 3, 100]), st.randoms())
@example(
    [(PLACE, (0.0, 0.0, 8, 8), None, 0, 0)] * 2,
    [(PLACE, (50.0, 50.0, 8, 8), 0.1), (PLACE, (0.0, 0.0, 8, 8), 0.1)],
    1,
    Random(3),
)
def test_equal_to_pycocotools(objects, detections, limit, random):
    """Crowds, areas, ties of scores and IoUs, limits, empty images, files in any order."""
    random.shuffle(detections)
    rows = [{**place, "bbox": list(box), "score": s} for place, box, s in detections]
    dataset, max_dets = dataset_of(objects), sorted({1, 2, limit})[: 3 if limit > 2 else limit]
    arrays = arrays_of(dataset, rows, "count", limit=limit)
    found = evaluate_boxes(*arrays, max_dets)
    wanted = arrays_by_pycocotools(coco_by(dataset, "count"), rows, max_dets)
    for key in ("ap", "recall"):
        np.testing.assert_allclose(found[key], wanted[key], rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(OBJECTS, DETECTIONS, st.sampled_from(["ignore", "count", "drop"]))
def test_difficult_objects_are_treated_as_the_evaluator_does(objects, detections, policy):
    """By the comparison's way to AP."""
    rows = [{**place, "bbox": list(box), "score": s} for place, box, s in detections]
    dataset = dataset_of(objects)
    matches = matches_of([arrays_of(dataset, rows, policy)])
    found = metrics_of(resampled_ap(matches, np.ones((1, len(IMAGES)), np.int32)))[0]
    expected = metrics_by_pycocotools(coco_by(dataset, policy), rows)
    names = metric_names([f"class{i}" for i in sorted(CATEGORIES)])
    wanted = [expected[name] for name in names]
    np.testing.assert_allclose(found / 100, np.array(wanted) / 100, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_matching_is_that_of_plain_loops(seed):
    ground_truth, detections = arrays_of(*random_case(seed, share_difficult=0.2))
    pairs = find_pairs(ground_truth, detections)
    outcomes, matched = match(ground_truth, detections, pairs, thresholds=[0.1, 0.5, 0.75])
    for t, threshold in enumerate((0.1, 0.5, 0.75)):
        outcome, object_of, iou = one_by_one(ground_truth, detections, threshold)
        np.testing.assert_array_equal(outcomes[t], outcome)
        right = outcome == RIGHT
        np.testing.assert_array_equal(matched[t][right], object_of[right])
    best = best_iou(ground_truth, pairs, len(detections))
    counts = iou[:, ~ground_truth.ignored].max(axis=1)
    np.testing.assert_allclose(best.iou, counts, atol=1e-12)
    np.testing.assert_array_equal(best.ignored, iou[:, ground_truth.ignored].max(axis=1) > counts)


def test_of_equal_objects_the_later_is_taken_first():
    objects = [(1, 1, [0, 0, 100, 100], {}), (1, 1, [0, 0, 100, 100], {})]
    case = arrays_of(
        coco_of(objects),
        detections_of([(1, 1, [0, 0, 80, 100], 0.9), (1, 1, [0, 0, 70, 100], 0.8)]),
    )
    outcome, matched = match(*case, find_pairs(*case), thresholds=[0.5, 0.75])
    assert matched.tolist() == [[1, 0], [1, -1]]
    assert outcome.tolist() == [[RIGHT, RIGHT], [RIGHT, WRONG]]


def test_pairs_are_the_same_in_small_chunks(monkeypatch):
    case = arrays_of(*random_case(1))
    whole = find_pairs(*case)
    monkeypatch.setattr("iou_balanced_d2.evaluation.matching._CHUNK", 7)
    parts = find_pairs(*case)
    for name in ("detection", "gt", "iou"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
