"""Which detection is about which object: COCO's matching, and the best IoU whatever the score.

Only pairs of one image and class are looked at, and only those that overlap are kept; everything
is done for all images at a time.

Letters: T IoU thresholds, D detections, G objects, Q pairs. Boxes are XYXY.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .alignment_data import Detections, GroundTruth

Array = NDArray[Any]

# Below this IoU a box is not about the object at all.
MIN_IOU = 0.1
# Pairs computed at a time; bounds the memory.
_CHUNK = 1_000_000
WRONG, RIGHT, IGNORED = 0, 1, -1


@dataclass(frozen=True)
class Pairs:
    """Overlapping pairs of one image and class, by detection; of each the preferred object first.

    Preferred are objects that count to ignored ones, then the larger IoU, then the later object:
    COCO's order.

    Attributes:
        detection: (Q,) int64, rising.
        gt: (Q,) int64, row of the object.
        iou: (Q,) float64, above 0; with a crowd the intersection over the detection's area.
    """

    detection: Array
    gt: Array
    iou: Array


@dataclass(frozen=True)
class BestIoU:
    """The largest IoU of each detection with an object of its image and class.

    Attributes:
        iou: (D,) float64, 0 without any overlap.
        gt: (D,) int64, that object; -1 for none.
        ignored: (D,) bool, the overlap with an ignored object is larger: neither good nor bad.
    """

    iou: Array
    gt: Array
    ignored: Array


def find_pairs(ground_truth: GroundTruth, detections: Detections) -> Pairs:
    """All pairs of a detection and an object of one image and class that overlap.

    Args:
        ground_truth: the objects.
        detections: the detections.

    Returns:
        the pairs.
    """
    parts = []
    for detection, gt in _candidates(ground_truth.group, detections.group):
        iou = _iou(detections.boxes[detection], ground_truth.boxes[gt], ground_truth.crowd[gt])
        kept = iou > 0
        parts.append((detection[kept], gt[kept], iou[kept]))
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    detection, gt, iou = (np.concatenate(x) for x in zip(*(parts or [empty]), strict=True))
    order = np.lexsort((-gt, -iou, ground_truth.ignored[gt], detection))
    return Pairs(detection[order], gt[order], iou[order])


def _candidates(gt_group: Array, detection_group: Array) -> Iterator[tuple[Array, Array]]:
    """Rows (detection, object) of equal group, some detections at a time."""
    start = np.searchsorted(gt_group, detection_group, "left")
    counts = np.searchsorted(gt_group, detection_group, "right") - start
    ends = counts.cumsum()
    first = 0
    while first < len(counts):
        done = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, done + _CHUNK, "right")), first + 1)
        n = counts[first:last]
        offset = np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)
        yield np.repeat(np.arange(first, last), n), np.repeat(start[first:last], n) + offset
        first = last


def _iou(box: Array, gt: Array, crowd: Array) -> Array:
    """IoU of each row's two boxes, float64; with a crowd over the area of ``box`` alone."""
    corners = np.minimum(box[:, 2:], gt[:, 2:]) - np.maximum(box[:, :2], gt[:, :2])
    intersection = corners.clip(min=0).prod(axis=1)
    area, gt_area = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (box, gt))
    union = np.where(crowd, area, area + gt_area - intersection)
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def best_iou(ground_truth: GroundTruth, pairs: Pairs, num_detections: int) -> BestIoU:
    """The object each detection overlaps most, whatever its score and the other detections.

    Args:
        ground_truth: the objects.
        pairs: of :func:`find_pairs`.
        num_detections: D.

    Returns:
        IoU and object of each detection.
    """
    iou, gt = np.zeros(num_detections), np.full(num_detections, -1)
    ignored_iou = np.zeros(num_detections)
    out = ground_truth.ignored[pairs.gt]
    np.maximum.at(ignored_iou, pairs.detection[out], pairs.iou[out])
    detection, first = np.unique(pairs.detection[~out], return_index=True)
    iou[detection], gt[detection] = pairs.iou[~out][first], pairs.gt[~out][first]
    return BestIoU(iou, gt, ignored_iou > iou)


def match_by_score(
    ground_truth: GroundTruth,
    detections: Detections,
    pairs: Pairs,
    thresholds: Sequence[float],
) -> tuple[Array, Array]:
    """COCO's greedy matching: in the order of scores each detection takes the best free object.

    An object counts if the IoU reaches the threshold. Without one that counts, a detection on an
    ignored object is ignored itself.

    Args:
        ground_truth: the objects.
        detections: the detections.
        pairs: of :func:`find_pairs`.
        thresholds: T IoU thresholds.

    Returns:
        outcome (T, D) int8, each RIGHT, WRONG or IGNORED; matched (T, D) int64, the object taken,
        -1 for none.
    """
    limits = np.array(thresholds)
    kept = pairs.iou >= limits.min()
    detection, gt, iou = pairs.detection[kept], pairs.gt[kept], pairs.iou[kept]
    free = np.ones((len(ground_truth.boxes), len(limits)), bool)
    matched = np.full((len(detections), len(limits)), -1)
    # Detections of one rank are of different images or classes: none can take another's object.
    rank = detections.rank[detection]
    order = np.argsort(rank, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
        if not len(rows):
            continue
        available = free[gt[rows]] & (iou[rows, None] >= limits)
        # The first available pair of each detection, by threshold; len(rows) for none.
        place = np.where(available, np.arange(len(rows))[:, None], len(rows))
        starts = np.flatnonzero(np.diff(detection[rows], prepend=-1))
        first = np.minimum.reduceat(place, starts, axis=0)
        d, t = np.nonzero(first < len(rows))
        taken = gt[rows[first[d, t]]]
        matched[detection[rows[starts[d]]], t] = taken
        free[taken, t] = ground_truth.ignored[taken]  # ignored objects are never used up
    ignored = np.append(ground_truth.ignored, False)[matched]  # -1 is the last, which counts
    outcome = np.where(ignored, IGNORED, np.where(matched >= 0, RIGHT, WRONG)).astype(np.int8)
    return outcome.T, matched.T
