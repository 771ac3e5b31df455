"""Does the score know how good the box is? The analysis of one data set's detections."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...evaluation.detections import Array, Detections, GroundTruth
from ...evaluation.matching import (
    IGNORED,
    RIGHT,
    BestIoU,
    Pairs,
    best_iou,
    class_aps,
    find_pairs,
    match,
    num_objects,
)
from ...evaluation.metrics import IOU_PERCENT, ap_summary
from .measures import (
    calibration,
    correlations,
    density,
    iou_bins,
    outranked_objects,
    perfectly_placed,
)
from .thresholds import best_thresholds, confusion_matrix

CALIBRATED_AT = (50, 75, 90)
# Fewer objects than this: another test set may well say something else.
_FEW_OBJECTS = 100
# AP points: less is not worth a training.
_LITTLE = 1.0
# A gap of placing so many times that of ranking is worked on first.
_CLEARLY = 2.0
_SCORE = "the IoU-balanced classification loss (MODEL.IOU_BALANCED.CLS_ETA)"
_BOX = "the IoU-balanced box loss (MODEL.IOU_BALANCED.LOC_LAMBDA)"


@dataclass(frozen=True)
class Alignment:
    """What was found, and what pictures of it need."""

    detections: Detections  #: the detections
    best: BestIoU  #: the object each of them overlaps most
    outranked: dict[str, Array]  #: of :func:`outranked_objects`
    #: The numbers as they go to alignment.json, arrays as NumPy's – "num_images", "num_objects",
    #: "num_detections"; "ap" and the "ceilings" "perfect_ranking" and "perfect_placing" (AP, AP50,
    #: ... AP95 in percent); "correlation"; "outranked"; "iou_bins"; "density"; "calibration" by IoU
    #: threshold; "classes", by name some of these and the "best_threshold"; "confusion" at these
    #: thresholds; "verdict", in words.
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
    outcome, matched = match(ground_truth, detections, pairs)
    right = outcome[0] == RIGHT
    iou = _iou_of_matched(pairs, matched[0], right)
    outranked = outranked_objects(detections, best)
    about = best.iou[~best.ignored], detections.scores[~best.ignored]
    aps = class_aps(ground_truth, detections, outcome)
    ranked = class_aps(ground_truth, detections, outcome, right_first=True)
    placed = perfectly_placed(ground_truth, detections, pairs, best)
    # Placed perfectly, a box is right or wrong at every threshold alike.
    of_placed = np.repeat(class_aps(ground_truth, detections, placed), len(outcome), axis=0)
    results: dict[str, Any] = {
        "num_images": len(ground_truth.images),
        "num_objects": int(num_objects(ground_truth).sum()),
        "num_detections": len(detections),
        "ap": ap_summary(aps),
        "ceilings": {
            "perfect_ranking": ap_summary(ranked),
            "perfect_placing": ap_summary(of_placed),
        },
        "correlation": correlations(detections.scores[right], iou[right]),
        "outranked": _outranked_summary(best, outranked),
        "iou_bins": iou_bins(*about),
        "density": density(*about),
        "calibration": {f".{p}": _calibration(detections, outcome, p) for p in CALIBRATED_AT},
        "classes": _by_class(ground_truth, detections, aps, right, iou),
    }
    best_f1 = best_thresholds(ground_truth, detections, outcome[0])
    confusion = confusion_matrix(
        ground_truth, detections, outcome[0], matched[0], best_f1["threshold"]
    )
    for k, of_class in enumerate(results["classes"].values()):
        of_class["best_threshold"] = {name: float(values[k]) for name, values in best_f1.items()}
    results |= {"confusion": confusion, "verdict": verdict(results)}
    return Alignment(detections, best, outranked, results)


def _iou_of_matched(pairs: Pairs, matched: Array, right: Array) -> Array:
    """IoU (D,) of each right detection with the object it was matched to, else 0."""
    iou = np.zeros(len(matched))
    chosen = (pairs.gt == matched[pairs.detection]) & right[pairs.detection]
    iou[pairs.detection[chosen]] = pairs.iou[chosen]
    return iou


def _calibration(detections: Detections, outcome: Array, percent: int) -> dict[str, Any]:
    of_threshold = outcome[IOU_PERCENT.index(percent)]
    counted = of_threshold != IGNORED
    return calibration(detections.scores[counted], of_threshold[counted] == RIGHT)


def _outranked_summary(best: BestIoU, outranked: dict[str, Array]) -> dict[str, float]:
    """How many objects, and how much IoU, the score's mistakes between neighbours cost."""
    lost = best.iou[outranked["placed"]] - best.iou[outranked["top"]]
    wrong = lost > 0
    return {
        "objects_detected": len(lost),
        "objects_outranked": int(wrong.sum()),
        "share": float(wrong.mean()) if len(lost) else float("nan"),
        "mean_iou_lost": float(lost[wrong].mean()) if wrong.any() else float("nan"),
    }


def _by_class(
    ground_truth: GroundTruth, detections: Detections, aps: Array, right: Array, iou: Array
) -> dict[str, Any]:
    found = {}
    numbers = num_objects(ground_truth)
    for k, name in enumerate(ground_truth.classes):
        rows = detections.of_class(k)
        chosen = right[rows]
        found[name] = {
            "num_objects": int(numbers[k]),
            "num_detections": int(rows.stop - rows.start),
            "ap": ap_summary(aps[:, k : k + 1]),
            "correlation": correlations(detections.scores[rows][chosen], iou[rows][chosen]),
        }
    return found


def verdict(results: Mapping[str, Any]) -> str:
    """What there is to win for a detector, and what to try: one to three sentences."""
    ap, objects = results["ap"]["AP"], results["num_objects"]
    if math.isnan(ap):
        return "There is no object to find, so nothing can be said."
    ranking, placing = (
        results["ceilings"][f"perfect_{kind}"]["AP"] - ap for kind in ("ranking", "placing")
    )
    text = f"AP is {ap:.0f}. "
    text += f"Perfect ranking would win {ranking:.0f} AP, perfect placing {placing:.0f}: "
    text += _advice(ranking, placing) + "."
    if objects < _FEW_OBJECTS:
        images = results["num_images"]
        text += f" Few data: {objects} objects in {images} images. Others may say something else."
    return text


def _advice(ranking: float, placing: float) -> str:
    if max(ranking, placing) < _LITTLE:
        return "neither loss can win much with these detections"
    if placing > _CLEARLY * ranking:
        return f"try {_BOX} first"
    # Not the classification loss alone: in the paper, too, both gain more than it does.
    return f"try both, {_SCORE} and {_BOX}"
