"""Numbers that say what the score knows of the box: bins, correlation, calibration, AP, ceilings.

Letters: T IoU thresholds, B bins, K classes, D detections.
"""

import math
from typing import Any

import numpy as np
from scipy import stats

from ...evaluation.detections import Array, Detections, GroundTruth
from ...evaluation.matching import (
    IGNORED,
    RIGHT,
    BestIoU,
    Pairs,
    match,
)

IOU_BINS = 20
SCORE_BINS = 10
# Below the first IoU a box is not about the object at all. From the second on it competes with the
# object's other boxes: a box of less is mostly on a neighbour that was not annotated or has another
# class. From the third on it is well placed.
MIN_IOU, COMPETES, WELL_PLACED = 0.1, 0.3, 0.5


def bins_of(values: Array, num_bins: int) -> Array:
    """Bin of each value in [0, 1], (D,) int64; the last bin includes 1."""
    return np.floor(values * num_bins).astype(np.int64).clip(0, num_bins - 1)


def iou_bins(iou: Array, scores: Array) -> dict[str, Array]:
    """The paper's Figs. 2 and 3: detections by the best IoU (D,) of their box.

    (20,) each: "count"; "share" of all detections; "mean_score", NaN in empty bins.
    """
    place = bins_of(iou, IOU_BINS)
    count = np.bincount(place, minlength=IOU_BINS)
    total = np.bincount(place, weights=scores, minlength=IOU_BINS)
    return {
        "count": count,
        "share": count / max(len(iou), 1),
        "mean_score": _ratio(total, count),
    }


def density(iou: Array, scores: Array) -> Array:
    """Number of detections by IoU (rows) and score (columns), (20, 20) int64."""
    place = bins_of(iou, IOU_BINS) * IOU_BINS + bins_of(scores, IOU_BINS)
    return np.bincount(place, minlength=IOU_BINS**2).reshape(IOU_BINS, IOU_BINS)


def calibration(scores: Array, right: Array) -> dict[str, Any]:
    """Reliability of the score (D,) in [0, 1] as the probability to be right (D,) bool.

    (10,) each: "count", "mean_score" and "share_right" by bins of the score, NaN in empty bins; and
    "ece", the expected calibration error: their mean distance, weighted by the count; NaN without
    detections.
    """
    place = bins_of(scores, SCORE_BINS)
    count = np.bincount(place, minlength=SCORE_BINS)
    score = np.bincount(place, weights=scores, minlength=SCORE_BINS)
    hits = np.bincount(place, weights=right, minlength=SCORE_BINS)
    return {
        "count": count,
        "mean_score": _ratio(score, count),
        "share_right": _ratio(hits, count),
        "ece": float(np.abs(score - hits).sum() / len(scores)) if len(scores) else float("nan"),
    }


def correlations(x: Array, y: Array) -> dict[str, float]:
    """Pearson's and Spearman's of two (D,) arrays, NaN if one is constant; "count" is D."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"count": len(x), "pearson": math.nan, "spearman": math.nan}
    pearson, spearman = stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]
    return {"count": len(x), "pearson": float(pearson), "spearman": float(spearman)}


def perfectly_placed(
    ground_truth: GroundTruth, detections: Detections, pairs: Pairs, best: BestIoU
) -> Array:
    """Outcome (1, D), at any IoU threshold, if each box was that of the object it is about.

    In the order of scores each detection takes the best free object of its image and class with an
    IoU of at least .1, and that object's box. What then is left over of detections that are about
    an object is ignored: its box would be one of those taken, so NMS would remove it.
    """
    outcome, _ = match(ground_truth, detections, pairs, thresholds=[MIN_IOU])
    outcome[:, (outcome[0] != RIGHT) & (best.iou >= MIN_IOU)] = IGNORED
    return outcome


def outranked_objects(detections: Detections, best: BestIoU) -> dict[str, Array]:
    """Objects with a well-placed box (IoU .5 or more), and the box that the score prefers.

    A detection is one of an object if that is the object it overlaps most, at IoU .3 or more. One
    entry an object: "gt" its row; "top" the row of its best-scored detection, "placed" that of its
    best-placed one (the same where the score is right); int64 each.
    """
    about = np.flatnonzero((best.iou >= COMPETES) & ~best.ignored)
    gt, iou, score = best.gt[about], best.iou[about], detections.scores[about]
    by_score = about[np.lexsort((-iou, -score, gt))]
    by_iou = about[np.lexsort((-score, -iou, gt))]
    objects, first = np.unique(np.sort(gt), return_index=True)
    top, placed = by_score[first], by_iou[first]
    well = best.iou[placed] >= WELL_PLACED
    return {"gt": objects[well], "top": top[well], "placed": placed[well]}


def _ratio(total: Array, count: Array) -> Array:
    """Quotient (B,) of two sums, NaN where the count is 0."""
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
