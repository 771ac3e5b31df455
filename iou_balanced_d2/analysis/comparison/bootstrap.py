"""AP of images drawn with replacement, without matching anew.

An image drawn m times counts m times: its detections and objects get the weight m in the running
sums that precision and recall are made of. Letters as in ``matches``; B resamples, S runs,
M metrics.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...evaluation.matching import RECALLS
from ...evaluation.metrics import AREAS, IOU_PERCENT
from .matches import Matches

Array = NDArray[Any]
# Resamples that are computed together: few enough that the arrays of a class fit in the cache.
_CHUNK = 64


class APs(NamedTuple):
    """AP between 0 and 1; NaN where no object was drawn.

    Attributes:
        thresholds: (B, K, T) by class and IoU threshold, float64.
        sizes: (B, K, 3) of small, medium and large objects, mean over thresholds, float64.
    """

    thresholds: Array
    sizes: Array


def draw_images(num_images: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each image is drawn.

    Args:
        num_images: N.
        resamples: B.
        rng: source of randomness.

    Returns:
        (B, N) int32; each row sums to N.
    """
    rows = (
        np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        for _ in range(resamples)
    )
    return np.stack([row.astype(np.int32) for row in rows])


def weighted_ap(matches: Matches, weights: Array) -> Array:
    """COCO's AP, 101 points of recall, with weighted images.

    Args:
        matches: of one class and range of area.
        weights: (B, N) int32, how often each image counts.

    Returns:
        (B, T) float64 between 0 and 1; NaN where there is no object.
    """
    num_objects = weights.take(matches.objects, axis=1).sum(axis=1)
    weight = weights.take(matches.images, axis=1)
    counted = np.cumsum(weight, axis=1, dtype=np.int32)
    ap = np.empty((len(weights), len(matches.hits)))
    for t, (hits, skipped) in enumerate(zip(matches.hits, matches.skipped, strict=True)):
        detected = counted.take(hits, axis=1)
        if skipped.size:
            left_out = np.cumsum(weight.take(skipped, axis=1), axis=1, dtype=np.int32)
            left_out = np.pad(left_out, ((0, 0), (1, 0)))
            detected -= left_out.take(np.searchsorted(skipped, hits), axis=1)
        right = np.cumsum(weight.take(hits, axis=1), axis=1, dtype=np.int32)
        ap[:, t] = _area(right, detected, num_objects)
    ap[num_objects == 0] = np.nan
    return ap


def _area(right: Array, detected: Array, num_objects: Array) -> Array:
    """(B,) mean over the points of recall of the best precision at that recall or a higher one.

    Args:
        right: (B, H), weight of right detections down to each right one.
        detected: (B, H), that of all detections that count.
        num_objects: (B,).
    """
    precision = right / np.maximum(detected, 1)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = right / np.maximum(num_objects, 1)[:, None]
    # Points of recall reached: floor, then compare with the very number.
    point = (100 * recall + 1e-7).astype(np.int32)
    reached = point + (RECALLS.take(point) <= recall)
    return np.einsum("bh,bh->b", best, np.diff(reached, axis=1, prepend=0)) / len(RECALLS)


def resampled_ap(matches: Sequence[Sequence[Matches]], weights: Array) -> APs:
    """AP of each class, threshold and size for each resample, on all processors.

    Args:
        matches: [K][A] of one run.
        weights: (B, N) int32, from :func:`draw_images`; a row of ones gives the plain AP.

    Returns:
        the AP.
    """
    shape = (len(weights), len(matches))
    result = APs(np.empty((*shape, len(IOU_PERCENT))), np.empty((*shape, len(AREAS))))

    def fill(start: int) -> None:
        rows = slice(start, start + _CHUNK)
        for k, (whole, *sizes) in enumerate(matches):
            result.thresholds[rows, k] = weighted_ap(whole, weights[rows])
            for a, size in enumerate(sizes):
                result.sizes[rows, k, a] = weighted_ap(size, weights[rows]).mean(axis=1)

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(fill, range(0, len(weights), _CHUNK)))
    return result


def metric_names(class_names: Sequence[str]) -> list[str]:
    """The M metrics of :func:`metrics_of`, named as the evaluator names them."""
    names = ["AP", *(f"AP{t}" for t in IOU_PERCENT), *(f"AP{a}" for a in AREAS)]
    return [*names, *(f"AP-{name}" for name in class_names)]


def metrics_of(ap: APs) -> Array:
    """The metrics of :func:`metric_names`, (B, M) in percent; NaN where undefined."""
    by_class = ap.thresholds.mean(axis=2)
    columns = [_mean(by_class)[:, None], _mean(ap.thresholds), _mean(ap.sizes), by_class]
    return 100 * np.concatenate(columns, axis=1)


def _mean(values: Array) -> Array:
    """Mean over the classes (axis 1) that are defined; NaN where none is."""
    defined = ~np.isnan(values)
    total = np.where(defined, values, 0).sum(axis=1)
    number = defined.sum(axis=1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
