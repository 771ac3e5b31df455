"""What a user sees who keeps the detections from a score threshold on: F1 and confusions.

Letters: K classes, D detections, G objects.
"""

from dataclasses import replace

import numpy as np

from ...evaluation.detections import Array, Detections, GroundTruth
from ...evaluation.matching import IGNORED, RIGHT, WRONG, find_pairs, match, num_objects

IOU = 0.5  # at which a detection is right here


def best_thresholds(
    ground_truth: GroundTruth, detections: Detections, outcome: Array
) -> dict[str, Array]:
    """The score threshold of each class with the largest F1, by the outcome (D,) at one IoU.

    (K,) each: "threshold", the lowest score that is kept; "precision", "recall" and "f1" of what is
    kept. Of equal F1 the highest threshold counts; NaN where no detection is right.
    """
    found = np.full((4, len(ground_truth.classes)), np.nan)
    for k, number in enumerate(num_objects(ground_truth)):
        rows = detections.of_class(k)
        counted = outcome[rows] != IGNORED
        scores, right = detections.scores[rows][counted], outcome[rows][counted] == RIGHT
        if not right.any():
            continue
        order = np.argsort(-scores, kind="stable")
        scores, hits = scores[order], right[order].cumsum()
        last = np.append(np.diff(scores) != 0, True)  # equal scores are kept together
        kept, scores, hits = np.flatnonzero(last) + 1, scores[last], hits[last]
        best = np.argmax(hits / (kept + number))
        found[:, k] = (
            scores[best],
            hits[best] / kept[best],
            hits[best] / number,
            2 * hits[best] / (kept[best] + number),
        )
    return dict(zip(("threshold", "precision", "recall", "f1"), found, strict=True))


def confusion_matrix(
    ground_truth: GroundTruth,
    detections: Detections,
    outcome: Array,
    taken: Array,
    thresholds: Array,
) -> Array:
    """Which class the objects are detected as, at a score threshold (K,) of each class.

    Detections of the object's own class come first, as in AP, by ``outcome`` and ``taken`` of
    :func:`match` at an IoU of .5. Then those left over take, in the order of their scores, the free
    object of another class with the largest IoU, if it reaches .5.

    (K + 1, K + 1) int64. Row: class of the object, the last one for detections on none; column:
    class it is detected as, the last one for objects that are missed.
    """
    num_classes = len(ground_truth.classes)
    kept = detections.scores >= thresholds[detections.label]
    right = kept & (outcome == RIGHT)
    free = ~ground_truth.ignored
    free[taken[right]] = False
    objects, left = np.flatnonzero(free), np.flatnonzero(kept & (outcome == WRONG))
    objects = objects[np.argsort(ground_truth.image[objects], kind="stable")]
    left = left[np.lexsort((-detections.scores[left], detections.image[left]))]
    truth, found = _as_one_class(ground_truth, detections, objects, left)
    _, other = match(truth, found, find_pairs(truth, found), thresholds=[IOU])
    other = other[0]
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    label = np.append(ground_truth.label[objects], num_classes)  # -1, for none, is the last
    np.add.at(matrix, (label[other], detections.label[left]), 1)
    missed = np.setdiff1d(np.arange(len(objects)), other)
    np.add.at(matrix, (label[missed], num_classes), 1)
    np.add.at(matrix, (detections.label[right], detections.label[right]), 1)
    return matrix


def _as_one_class(
    ground_truth: GroundTruth, detections: Detections, objects: Array, found: Array
) -> tuple[GroundTruth, Detections]:
    """Some objects and detections, their rows by image, as if all were of one class."""
    image = detections.image[found]
    one = replace(
        detections,
        boxes=detections.boxes[found],
        areas=detections.areas[found],
        scores=detections.scores[found],
        group=image,
        rank=np.arange(len(image)) - np.searchsorted(image, image),
        label=np.zeros_like(image),
        image=image,
    )
    columns = ("boxes", "box_areas", "areas", "crowd", "ignored")
    rows = {name: getattr(ground_truth, name)[objects] for name in columns}
    truth = replace(ground_truth, **rows, group=ground_truth.image[objects], classes=[""])
    return truth, one
