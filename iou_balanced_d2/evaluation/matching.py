"""Which detection is about which object: COCO's matching, and the best IoU whatever the score.

Only pairs of one image and class are looked at, and only those that overlap are kept; everything
is done for all images at a time.

Letters: T IoU thresholds, D detections, G objects, Q pairs. Boxes are XYXY.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .detections import Array, Detections, GroundTruth
from .metrics import IOU_THRESHOLDS

# COCO's, in pixels; an object or detection on a limit belongs to both ranges.
AREA_RANGES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
# COCO's points of recall, by its own expression: ten of them are off r / 100 by their last bit.
RECALLS = np.linspace(0.0, 1.00, 101)
# Pairs computed at a time; bounds the memory.
_CHUNK = 1_000_000
WRONG, RIGHT, IGNORED = 0, 1, -1


@dataclass(frozen=True)
class Pairs:
    """Overlapping pairs of one image and class, by detection; of each the preferred object first.

    Preferred are objects that count to ignored ones, then the larger IoU, then the later object:
    COCO's order.
    """

    detection: Array  #: (Q,) int64, rising
    gt: Array  #: (Q,) int64, row of the object
    iou: Array  #: (Q,) float64, above 0; with a crowd the intersection over the detection's area


@dataclass(frozen=True)
class BestIoU:
    """The largest IoU of each detection with an object of its image and class."""

    iou: Array  #: (D,) float64, 0 without any overlap
    gt: Array  #: (D,) int64, that object; -1 for none
    ignored: Array  #: (D,) bool, the overlap with an ignored object is larger; neither good nor bad


def find_pairs(ground_truth: GroundTruth, detections: Detections) -> Pairs:
    """All pairs of a detection and an object of one image and class that overlap."""
    parts = []
    for detection, gt in _candidates(ground_truth.group, detections.group):
        iou = _iou(ground_truth, detections, detection, gt)
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


def _iou(ground_truth: GroundTruth, detections: Detections, detection: Array, gt: Array) -> Array:
    """IoU of each pair, float64; with a crowd the share of the detection that lies within."""
    box, other = detections.boxes[detection], ground_truth.boxes[gt]
    corners = np.minimum(box[:, 2:], other[:, 2:]) - np.maximum(box[:, :2], other[:, :2])
    intersection = corners.clip(min=0).prod(axis=1)
    area = detections.areas[detection]
    both = area + ground_truth.box_areas[gt] - intersection
    union = np.where(ground_truth.crowd[gt], area, both)
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def best_iou(ground_truth: GroundTruth, pairs: Pairs, num_detections: int) -> BestIoU:
    """The object each of D detections overlaps most, whatever its score and the others."""
    iou, gt = np.zeros(num_detections), np.full(num_detections, -1)
    ignored_iou = np.zeros(num_detections)
    out = ground_truth.ignored[pairs.gt]
    np.maximum.at(ignored_iou, pairs.detection[out], pairs.iou[out])
    detection, first = np.unique(pairs.detection[~out], return_index=True)
    iou[detection], gt[detection] = pairs.iou[~out][first], pairs.gt[~out][first]
    return BestIoU(iou, gt, ignored_iou > iou)


def match(
    ground_truth: GroundTruth,
    detections: Detections,
    pairs: Pairs,
    *,
    thresholds: Sequence[float] | Array = IOU_THRESHOLDS,
    area: str = "all",
) -> tuple[Array, Array]:
    """COCO's greedy matching: in the order of scores each detection takes the best free object.

    An object is taken if the IoU reaches the threshold; ignored ones, and those out of the range of
    area, only where no other one is free. A detection is then ignored itself, as is one that takes
    nothing and is out of the range. Crowds and difficult objects stay free.

    Args:
        ground_truth: the objects.
        detections: the detections.
        pairs: of :func:`find_pairs`.
        thresholds: T IoU thresholds.
        area: a key of :data:`AREA_RANGES`.

    Returns:
        outcome (T, D) int8, each RIGHT, WRONG or IGNORED; taken (T, D) int64, rows of objects, -1
        for none.
    """
    limits = np.minimum(thresholds, 1 - 1e-10)  # as pycocotools: an IoU of 1 may be computed less
    ignored = ~counted_objects(ground_truth, area)
    kept = np.flatnonzero(pairs.iou >= limits.min())
    gt, iou, detection = pairs.gt[kept], pairs.iou[kept], pairs.detection[kept]
    # By rank first: detections of one rank are of different images or classes, so that none can
    # take another's object. Then COCO's preference; of equal objects it takes the last.
    rank = detections.rank[detection]
    order = np.lexsort((-gt, -iou, ignored[gt], detection, rank))
    gt, iou, detection = gt[order], iou[order], detection[order]
    free = np.ones((len(ignored), len(limits)), bool)
    taken = np.full((len(detections), len(limits)), -1)
    for rows in np.split(np.arange(len(gt)), np.flatnonzero(np.diff(rank[order])) + 1):
        if len(rows):
            d, t, objects = _first_free(gt[rows], iou[rows], detection[rows], free, limits)
            taken[d, t] = objects
            free[objects, t] = ground_truth.ignored[objects]
    outcome = np.where(np.append(ignored, False)[taken], IGNORED, RIGHT)  # -1 is the last
    inside = _in_range(detections.areas, area)[:, None]
    outcome = np.where(taken >= 0, outcome, np.where(inside, WRONG, IGNORED))
    return outcome.astype(np.int8).T, taken.T


def _first_free(
    gt: Array, iou: Array, detection: Array, free: Array, limits: Array
) -> tuple[Array, Array, Array]:
    """Detections, thresholds and the objects they take, of the pairs of one rank in order."""
    available = free[gt] & (iou[:, None] >= limits)
    place = np.where(available, np.arange(len(gt))[:, None], len(gt))
    starts = np.flatnonzero(np.diff(detection, prepend=-1))
    first = np.minimum.reduceat(place, starts, axis=0)
    d, t = np.nonzero(first < len(gt))
    return detection[starts[d]], t, gt[first[d, t]]


def counted_objects(ground_truth: GroundTruth, area: str = "all") -> Array:
    """The objects to find, (G,) bool: those in a range of :data:`AREA_RANGES`, not ignored."""
    return ~ground_truth.ignored & _in_range(ground_truth.areas, area)


def num_objects(ground_truth: GroundTruth, area: str = "all") -> Array:
    """Number of objects to find of each class, (K,) int64; see :func:`counted_objects`."""
    label = ground_truth.label[counted_objects(ground_truth, area)]
    return np.bincount(label, minlength=len(ground_truth.classes))


def _in_range(areas: Array, area: str) -> Array:
    low, high = AREA_RANGES[area]
    return (areas >= low) & (areas <= high)


def average_precision(right: Array, num_objects: int) -> float:
    """COCO's AP of one class: the mean of the precision's envelope at 101 points of recall.

    Args:
        right: (D,) bool, best score first, without ignored detections.
        num_objects: number of objects to find.

    Returns:
        AP in [0, 1]; NaN without objects.
    """
    if num_objects == 0:
        return float("nan")
    hits = right.cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    places = np.searchsorted(hits / num_objects, RECALLS, side="left")
    return float(envelope[places].mean())


def class_aps(
    ground_truth: GroundTruth,
    detections: Detections,
    outcome: Array,
    *,
    area: str = "all",
    right_first: bool = False,
) -> Array:
    """AP of each threshold and class.

    Args:
        ground_truth: the objects.
        detections: the detections.
        outcome: (T, D) of :func:`match` in that range of area.
        area: a key of :data:`AREA_RANGES`.
        right_first: as if every right detection had a higher score than every wrong one.

    Returns:
        (T, K) float64 in [0, 1]; NaN for classes without objects.
    """
    numbers = num_objects(ground_truth, area)
    aps = np.full((len(outcome), len(numbers)), np.nan)
    for k in np.flatnonzero(numbers).tolist():
        # A class is one run of rows, in the order of images; as COCO, equal scores stay in it.
        rows = detections.of_class(k)
        order = np.argsort(-detections.scores[rows], kind="stable")
        for t, of_class in enumerate(outcome[:, rows]):
            counted = of_class[order]
            right = counted[counted != IGNORED] == RIGHT
            ranked = np.sort(right)[::-1] if right_first else right
            aps[t, k] = average_precision(ranked, numbers[k])
    return aps


def evaluate_boxes(
    ground_truth: GroundTruth, detections: Detections, max_dets: Sequence[int] = (1, 10, 100)
) -> dict[str, Array]:
    """COCO's AP and average recall, all that :func:`coco_metrics` needs.

    Args:
        ground_truth: the objects.
        detections: the detections, at most the last of the limits of an image and class.
        max_dets: M limits of detections an image and class, rising; the last one is AP's.

    Returns:
        "ap" (T, K, A) and "recall" (T, K, A, M) in [0, 1], for the thresholds .50 to .95 and the
        ranges of :data:`AREA_RANGES`; NaN for classes without objects.
    """
    pairs = find_pairs(ground_truth, detections)
    ap, recall = [], []
    for area in AREA_RANGES:
        outcome, _ = match(ground_truth, detections, pairs, area=area)
        ap.append(class_aps(ground_truth, detections, outcome, area=area))
        number = num_objects(ground_truth, area)
        right = [[(o == RIGHT) & (detections.rank < m) for m in max_dets] for o in outcome]
        hits = [
            [np.bincount(detections.label[r], minlength=len(number)) for r in of_threshold]
            for of_threshold in right
        ]
        share = np.array(hits) / np.where(number, number, np.nan)  # (T, M, K)
        recall.append(share.swapaxes(1, 2))
    return {"ap": np.stack(ap, axis=2), "recall": np.stack(recall, axis=2)}
