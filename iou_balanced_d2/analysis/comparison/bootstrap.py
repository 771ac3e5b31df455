"""AP of images drawn with replacement: detections are matched with objects once, not anew.

An image drawn m times counts m times: its detections and objects get the weight m in the running
sums that precision and recall are made of.

Letters: N images, K classes, A ranges of area (all, small, medium, large), T IoU thresholds (.50 to
.95), D detections and G objects of one class; B resamples, S runs, M metrics.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ...evaluation.detections import Array, Detections, GroundTruth
from ...evaluation.matching import (
    AREA_RANGES,
    IGNORED,
    RECALLS,
    RIGHT,
    counted_objects,
    find_pairs,
    match,
)
from ...evaluation.metrics import AREAS, IOU_PERCENT
from .statistics import mean

# Resamples that are computed together: few enough that the arrays of a class fit in the cache.
_CHUNK = 64


class Matches(NamedTuple):
    """One class in one range of area: detections best score first, up to the last right one."""

    images: Array  # (D,) int32, rows of images
    hits: tuple[Array, ...]  # T arrays of rows of detections, rising: the right ones
    skipped: tuple[Array, ...]  # T arrays, likewise: the ignored ones
    objects: Array  # (G,) int32, rows of the images of the objects that count


def matches_of(parts: Sequence[tuple[GroundTruth, Detections]]) -> list[list[Matches]]:
    """Match by COCO's rules, [K][A], and rank the detections of all data sets together by score.

    All have the same classes. The rows of a data set's images begin where those of the one before
    end; equal scores are in the order of the data sets, then as COCO has them.
    """
    first_rows = np.cumsum([0, *(len(truth.images) for truth, _ in parts)])
    label = np.concatenate([d.label for _, d in parts])
    order = np.lexsort((-np.concatenate([d.scores for _, d in parts]), label))
    images = _shifted([d.image for _, d in parts], first_rows)[order]
    pairs = [find_pairs(*part) for part in parts]
    classes = range(len(parts[0][0].classes))
    ends = np.searchsorted(label[order], classes, "right")
    rows = [slice(*x) for x in zip([0, *ends[:-1]], ends, strict=True)]
    by_area = []
    for area in AREA_RANGES:
        found = [match(*part, p, area=area)[0] for part, p in zip(parts, pairs, strict=True)]
        outcome = np.concatenate(found, axis=1)[:, order]
        counted = [counted_objects(truth, area) for truth, _ in parts]
        at = [truth.image[c] for (truth, _), c in zip(parts, counted, strict=True)]
        objects = _shifted(at, first_rows)
        of = np.concatenate([t.label[c] for (t, _), c in zip(parts, counted, strict=True)])
        by_area.append(
            [ranked(images[rows[k]], outcome[:, rows[k]], objects[of == k]) for k in classes]
        )
    return [list(areas) for areas in zip(*by_area, strict=True)]


def ranked(images: Array, outcome: Array, objects: Array) -> Matches:
    """What AP needs of one class: outcomes (T, D), best score first, and the images of objects."""
    kept = ~(outcome == IGNORED).all(axis=0)
    right, ignored = outcome[:, kept] == RIGHT, outcome[:, kept] == IGNORED
    any_right = np.flatnonzero(right.any(axis=0))
    # What ranks below the last right detection changes no precision that counts.
    end = any_right[-1] + 1 if any_right.size else 0
    return Matches(
        images=images[kept][:end],
        hits=tuple(np.flatnonzero(x) for x in right),
        skipped=tuple(np.flatnonzero(x[:end]) for x in ignored),
        objects=objects,
    )


def _shifted(rows: Sequence[Array], first_rows: Array) -> Array:
    moved = [r + first for r, first in zip(rows, first_rows, strict=False)]
    return np.concatenate(moved).astype(np.int32)


class APs(NamedTuple):
    """AP between 0 and 1; NaN where no object was drawn."""

    thresholds: Array  # (B, K, T) by class and IoU threshold, float64
    sizes: Array  # (B, K, 3) of small, medium and large objects, mean over thresholds, float64


def draw_images(num_images: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each image is drawn, (B, N) int32; each row sums to N."""
    rows = (
        np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        for _ in range(resamples)
    )
    return np.stack([row.astype(np.int32) for row in rows])


def weighted_ap(matches: Matches, weights: Array) -> Array:
    """COCO's AP (B, T), 101 points of recall, with images weighted (B, N); NaN without objects."""
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

    (B, H) are the weights of right and of all detections that count, down to each right one.
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

    The matches [K][A] are of one run; a row of ones in the weights (B, N) gives the plain AP.
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
    overall, *others = (mean(x, axis=1) for x in (by_class, ap.thresholds, ap.sizes))
    return 100 * np.concatenate([overall[:, None], *others, by_class], axis=1)
