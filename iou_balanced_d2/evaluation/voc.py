"""PASCAL VOC's average precision, at any IoU threshold.

Matching is the devkit's: the detections of a class, best score first, each claim the object of
their class and image with the largest IoU, if that reaches the threshold. The first claim of an
object is right, every later one wrong; claims of a difficult object do not count. IoU is that of
boxes with continuous coordinates. (The devkit's boxes are of whole pixels, both ends included,
hence its +1; converted to COCO form they are the same boxes with the same IoU.)

Letters: T IoU thresholds, K classes, D detections and G objects of one class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .detections import Array, Detections, GroundTruth
from .matching import find_pairs, num_objects
from .metrics import IOU_THRESHOLDS, ap_summary

# By the devkit's expression: .3, .6 and .7 are a bit more than that, and 3 of 10 objects miss .3.
_POINTS = np.arange(0.0, 1.1, 0.1)


class VocAP(NamedTuple):
    """AP between 0 and 1, (T, K) float64 each; NaN for classes without objects."""

    eleven_point: Array  # mean of the precision at recall 0, .1, ... 1 (VOC 2007)
    area: Array  # area under the precision's envelope (VOC 2010 and later)


def voc_average_precision(
    ground_truth: GroundTruth,
    detections: Detections,
    *,
    iou_thresholds: Sequence[float] | Array = IOU_THRESHOLDS,
) -> VocAP:
    """AP of each class at each threshold.

    Args:
        ground_truth: the objects; difficult ones are ignored if they are so here.
        detections: all there are; those of equal score count in the order of the images.
        iou_thresholds: T thresholds; an IoU equal to one reaches it.

    Returns:
        AP by threshold and class.
    """
    iou, claimed = _claims(ground_truth, detections)
    ap = np.full((2, len(iou_thresholds), len(ground_truth.classes)), np.nan)
    for k, number in enumerate(num_objects(ground_truth)):
        rows = np.arange(len(detections))[detections.of_class(k)]
        rows = rows[np.argsort(-detections.scores[rows], kind="stable")]
        for t, threshold in enumerate(iou_thresholds if number else ()):
            reached = iou[rows] >= threshold
            ap[:, t, k] = _ap(_right(reached, claimed[rows], ground_truth.ignored), number)
    return VocAP(*ap)


def _claims(ground_truth: GroundTruth, detections: Detections) -> tuple[Array, Array]:
    """The largest IoU (D,) of each detection, and the row (D,) of that object; -1 for none."""
    pairs = find_pairs(ground_truth, detections)
    order = np.lexsort((pairs.gt, -pairs.iou, pairs.detection))
    detection, first = np.unique(pairs.detection[order], return_index=True)
    iou, claimed = np.zeros(len(detections)), np.full(len(detections), -1)
    iou[detection], claimed[detection] = pairs.iou[order][first], pairs.gt[order][first]
    return iou, claimed


def _right(reached: Array, claimed: Array, ignored: Array) -> Array:
    """Whether each detection that counts is right (bool), without those on ignored objects.

    ``reached`` (D,) is whether the IoU with the claimed object reaches the threshold, ``claimed``
    (D,) the object's row.
    """
    left_out = reached & ignored[claimed]
    valid = np.flatnonzero(reached & ~left_out)
    right = np.zeros(len(reached), bool)
    right[valid[np.unique(claimed[valid], return_index=True)[1]]] = True
    return right[~left_out]


def _ap(right: Array, num_objects: int) -> tuple[float, float]:
    """AP by 11 points and by area of right and wrong detections (D,), best score first."""
    hits = right.cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # The best precision from the first detection on that reaches the recall.
    places = np.searchsorted(hits / num_objects, _POINTS)
    eleven_point = np.append(envelope, 0.0)[places].mean()
    # Recall grows by 1 / num_objects at each hit.
    return float(eleven_point), float(envelope[right].sum() / num_objects)


def voc_metrics(ap: VocAP, class_names: Sequence[str]) -> dict[str, float]:
    """VOC's AP by name, in percent, of AP at the thresholds .50 to .95.

    For "11pt" and "area": AP_11pt (mean over thresholds and classes), AP50_11pt, ... AP95_11pt
    (mean over classes), and AP50_11pt-<class>.
    """
    metrics: dict[str, float] = {}
    kinds = {"11pt": ap.eleven_point, "area": ap.area}
    for kind, values in kinds.items():
        metrics |= {f"{name}_{kind}": value for name, value in ap_summary(values).items()}
    for kind, values in kinds.items():
        each = zip(class_names, values[0], strict=True)
        metrics |= {f"AP50_{kind}-{name}": float(100 * x) for name, x in each}
    return metrics
