"""Does the score know how good the box is? The analysis of one data set's detections."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .alignment_data import Detections, GroundTruth
from .alignment_matching import (
    IGNORED,
    RIGHT,
    BestIoU,
    Pairs,
    best_iou,
    find_pairs,
    match_by_score,
)
from .alignment_measures import (
    IOU_PERCENT,
    ap_summary,
    calibration,
    class_aps,
    correlations,
    density,
    iou_bins,
    outranked_objects,
    perfectly_placed,
)

CALIBRATED_AT = (50, 75, 90)


@dataclass(frozen=True)
class Alignment:
    """What was found, and what pictures of it need.

    Attributes:
        detections: the detections.
        best: the object each of them overlaps most.
        outranked: of :func:`outranked_objects`.
        results: the numbers as they go to alignment.json, arrays as NumPy's: "num_images",
            "num_objects", "num_detections"; "ap" and the "ceilings" "perfect_ranking" and
            "perfect_placing" (AP, AP50, ... AP95 in percent); "correlation"; "outranked";
            "iou_bins"; "density"; "calibration" by IoU threshold; "classes", by name some of these.
    """

    detections: Detections
    best: BestIoU
    outranked: dict[str, NDArray[Any]]
    results: dict[str, Any]


def analyze(ground_truth: GroundTruth, detections: Detections) -> Alignment:
    """Compare scores with IoUs.

    Args:
        ground_truth: the objects.
        detections: the detections on the same data set.

    Returns:
        the analysis.
    """
    pairs = find_pairs(ground_truth, detections)
    best = best_iou(ground_truth, pairs, len(detections))
    thresholds = [percent / 100 for percent in IOU_PERCENT]
    outcome, matched = match_by_score(ground_truth, detections, pairs, thresholds)
    matched_iou = _iou_of_matched(pairs, matched[0], outcome[0] == RIGHT)
    outranked = outranked_objects(detections, best)
    counted = ~best.ignored
    results = {
        "num_images": len(ground_truth.images),
        "num_objects": int(ground_truth.num_objects().sum()),
        "num_detections": len(detections),
        **_aps(ground_truth, detections, pairs, best, outcome),
        "correlation": _correlation(detections, outcome[0], matched_iou),
        "outranked": _outranked_summary(best, outranked),
        "iou_bins": iou_bins(best.iou[counted], detections.scores[counted]),
        "density": density(best.iou[counted], detections.scores[counted]),
        "calibration": {f".{p}": _calibration(detections, outcome, p) for p in CALIBRATED_AT},
    }
    results["classes"] = _by_class(ground_truth, detections, best, outcome, matched_iou)
    return Alignment(detections, best, outranked, results)


def _iou_of_matched(
    pairs: Pairs, matched: NDArray[Any], right: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """IoU (D,) of each right detection with the object it was matched to, else 0."""
    iou = np.zeros(len(matched))
    chosen = (pairs.gt == matched[pairs.detection]) & right[pairs.detection]
    iou[pairs.detection[chosen]] = pairs.iou[chosen]
    return iou


def _aps(
    ground_truth: GroundTruth,
    detections: Detections,
    pairs: Pairs,
    best: BestIoU,
    outcome: NDArray[Any],
) -> dict[str, Any]:
    placed = perfectly_placed(ground_truth, detections, pairs, best)
    # Placed perfectly, a box is right or wrong at every threshold alike.
    of_placed = np.repeat(class_aps(ground_truth, detections, placed), len(IOU_PERCENT), axis=0)
    ranked = class_aps(ground_truth, detections, outcome, right_first=True)
    return {
        "ap": ap_summary(class_aps(ground_truth, detections, outcome)),
        "ceilings": {
            "perfect_ranking": ap_summary(ranked),
            "perfect_placing": ap_summary(of_placed),
        },
    }


def _correlation(
    detections: Detections, outcome: NDArray[Any], matched_iou: NDArray[Any]
) -> dict[str, float]:
    right = outcome == RIGHT
    return correlations(detections.scores[right], matched_iou[right])


def _calibration(detections: Detections, outcome: NDArray[Any], percent: int) -> dict[str, Any]:
    of_threshold = outcome[IOU_PERCENT.index(percent)]
    counted = of_threshold != IGNORED
    return calibration(detections.scores[counted], of_threshold[counted] == RIGHT)


def _outranked_summary(best: BestIoU, outranked: dict[str, NDArray[Any]]) -> dict[str, float]:
    """How many objects, and how much IoU, the score's mistakes between neighbours cost."""
    lost = best.iou[outranked["placed"]] - best.iou[outranked["top"]]
    wrong = lost > 0
    num_objects = len(lost)
    return {
        "objects_detected": num_objects,
        "objects_outranked": int(wrong.sum()),
        "share": float(wrong.mean()) if num_objects else float("nan"),
        "mean_iou_lost": float(lost[wrong].mean()) if wrong.any() else float("nan"),
    }


def _by_class(
    ground_truth: GroundTruth,
    detections: Detections,
    best: BestIoU,
    outcome: NDArray[Any],
    matched_iou: NDArray[Any],
) -> dict[str, Any]:
    aps = class_aps(ground_truth, detections, outcome)
    num_objects = ground_truth.num_objects()
    found = {}
    for k, name in enumerate(ground_truth.classes):
        rows = slice(*np.searchsorted(detections.label, (k, k + 1)))
        counted = ~best.ignored[rows]
        iou, scores = best.iou[rows][counted], detections.scores[rows][counted]
        right = outcome[0, rows] == RIGHT
        found[name] = {
            "num_objects": int(num_objects[k]),
            "num_detections": int(rows.stop - rows.start),
            "ap": ap_summary(aps[:, k : k + 1]),
            "correlation": correlations(detections.scores[rows][right], matched_iou[rows][right]),
            "iou_bins": iou_bins(iou, scores),
        }
    return found
