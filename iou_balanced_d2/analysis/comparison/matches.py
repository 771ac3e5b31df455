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
    counted_objects,
    find_pairs,
    match,
)

Array = NDArray[Any]


class Matches(NamedTuple):
    """One class in one range of area: detections best score first, up to the last right one.

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


def matches_of(parts: Sequence[tuple[GroundTruth, Detections]]) -> list[list[Matches]]:
    """Match by COCO's rules and rank the detections of all data sets together by score.

    Args:
        parts: objects and detections of each data set; their classes are the same, and the rows of
            a data set's images begin where those of the one before end.

    Returns:
        the matches [K][A]; equal scores in the order of the data sets, then as COCO has them.
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
    """What AP needs of the outcomes of one class.

    Args:
        images: (D,) int32, rows of images, of the detections best score first.
        outcome: (T, D), each RIGHT, WRONG or IGNORED.
        objects: (G,) int32, rows of the images of the objects that count.
    """
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
