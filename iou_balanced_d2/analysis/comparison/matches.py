"""Detections matched with objects once, in the form that AP of reweighted images needs.

Letters: N images, K classes, A ranges of area (all, small, medium, large), T IoU thresholds (.50 to
.95), D detections and G objects of one class.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...evaluation.detections import Detections, GroundTruth
from ...evaluation.matching import (
    AREA_RANGES,
    IGNORED,
    RIGHT,
    Pairs,
    counted_objects,
    find_pairs,
    match,
)

Array = NDArray[Any]


class Outcomes(NamedTuple):
    """What became of the detections of one class in one range of area.

    Attributes:
        scores: (D,) float64, in the order in which COCO breaks ties.
        images: (D,) int32, rows of images.
        right: (T, D) bool, matched to an object that counts.
        ignored: (T, D) bool, neither right nor wrong.
        objects: (G,) int32, rows of the images of the objects that count.
    """

    scores: Array
    images: Array
    right: Array
    ignored: Array
    objects: Array


class Matches(NamedTuple):
    """What AP needs of :class:`Outcomes`: detections best score first, up to the last right one.

    Attributes:
        images: (D,) int32, rows of images.
        hits: T arrays of rows of detections, rising: the right ones.
        skipped: T arrays, likewise: the ignored ones.
        objects: (G,) int32, rows of the images of the objects that count.
    """

    images: Array
    hits: tuple[Array, ...]
    skipped: tuple[Array, ...]
    objects: Array


def outcomes_of(ground_truth: GroundTruth, detections: Detections) -> list[list[Outcomes]]:
    """Match by COCO's rules, see :func:`iou_balanced_d2.evaluation.matching.match`.

    Args:
        ground_truth: the objects.
        detections: the detections.

    Returns:
        outcomes [K][A].
    """
    pairs = find_pairs(ground_truth, detections)
    by_area = [_outcomes(ground_truth, detections, pairs, area) for area in AREA_RANGES]
    return [list(areas) for areas in zip(*by_area, strict=True)]


def _outcomes(
    ground_truth: GroundTruth, detections: Detections, pairs: Pairs, area: str
) -> list[Outcomes]:
    """Outcomes [K] in one range of area."""
    outcome, _ = match(ground_truth, detections, pairs, area=area)
    counted = counted_objects(ground_truth, area)
    label, image = ground_truth.label[counted], ground_truth.image[counted].astype(np.int32)
    found = []
    for k in range(len(ground_truth.classes)):
        rows = detections.of_class(k)
        ignored = outcome[:, rows] == IGNORED
        kept = ~ignored.all(axis=0)
        found.append(
            Outcomes(
                scores=detections.scores[rows][kept],
                images=detections.image[rows][kept].astype(np.int32),
                right=(outcome[:, rows] == RIGHT)[:, kept],
                ignored=ignored[:, kept],
                objects=image[label == k],
            )
        )
    return found


def pool(parts: Sequence[Outcomes], offsets: Sequence[int]) -> Matches:
    """Pool the outcomes of several data sets and rank them by score.

    Args:
        parts: those of each data set.
        offsets: the row that each data set's images begin at.

    Returns:
        the matches; equal scores in the order of the data sets, then as COCO has them.
    """
    scores = np.concatenate([p.scores for p in parts])
    order = np.argsort(-scores, kind="stable")
    right = np.concatenate([p.right for p in parts], axis=1)[:, order]
    ignored = np.concatenate([p.ignored for p in parts], axis=1)[:, order]
    images = _shifted([p.images for p in parts], offsets)[order]
    any_right = np.flatnonzero(right.any(axis=0))
    # What ranks below the last right detection changes no precision that counts.
    end = any_right[-1] + 1 if any_right.size else 0
    return Matches(
        images=images[:end],
        hits=tuple(np.flatnonzero(x) for x in right),
        skipped=tuple(np.flatnonzero(x[:end]) for x in ignored),
        objects=_shifted([p.objects for p in parts], offsets),
    )


def _shifted(rows: Sequence[Array], offsets: Sequence[int]) -> Array:
    return np.concatenate([r + o for r, o in zip(rows, offsets, strict=True)]).astype(np.int32)
