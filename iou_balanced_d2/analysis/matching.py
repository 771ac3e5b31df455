"""Detections matched with objects once, in the form that AP of reweighted images needs.

Letters: N images, K classes, A ranges of area (all, small, medium, large), T IoU thresholds (.50 to
.95), D detections and G objects of one class.
"""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.coco_format import read_coco_json
from ..errors import UserError
from ..evaluation.coco_eval import ignoring_difficult, load_results
from ..evaluation.ground_truth import prepare_ground_truth
from ..evaluation.metrics import IOU_PERCENT

Array = NDArray[Any]
MAX_DETECTIONS = 100  # of an image and class


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


def read_ground_truth(path: str, difficult: str) -> COCO:
    """Read annotations of COCO form and prepare them as the evaluator does.

    Args:
        path: a JSON file.
        difficult: see :func:`prepare_ground_truth`.

    Returns:
        the ground truth.

    Raises:
        UserError: if the file or the policy is wrong.
    """
    coco = COCO()
    coco.dataset = read_coco_json(path)
    for number, annotation in enumerate(coco.dataset["annotations"], start=1):
        annotation.setdefault("id", number)
    prepare_ground_truth(coco, difficult)
    return coco


def read_detections(path: str, coco: COCO) -> list[dict[str, Any]]:
    """Read detections and make sure that they speak of this ground truth.

    Args:
        path: a JSON list of detections in COCO's format: "image_id", "category_id", "bbox" (XYWH,
            pixels), "score".
        coco: the ground truth.

    Returns:
        the detections.

    Raises:
        UserError: if the file is missing or of another format, or names unknown images or classes.
    """
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file: {error}") from error
    needed = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and needed <= r.keys() for r in rows
    ):
        raise UserError(
            f"{path}: not detections in COCO format: expected a list of objects with "
            f"{', '.join(sorted(needed))}"
        )
    for key, known, what in (("image_id", coco.imgs, "image"), ("category_id", coco.cats, "class")):
        unknown = [row[key] for row in rows if row[key] not in known]
        if unknown:
            raise UserError(
                f"{path}: detections of {what} {unknown[0]!r}, which the ground truth does not "
                "have: are they of another data set?"
            )
    return rows


def match(coco: COCO, detections: Sequence[Mapping[str, Any]]) -> list[list[Outcomes]]:
    """Match by pycocotools' rules, at most 100 detections an image and class.

    Args:
        coco: ground truth, from :func:`prepare_ground_truth`; difficult objects are ignored by
            VOC's rule, as in :func:`evaluate_boxes`.
        detections: in COCO's format.

    Returns:
        outcomes [K][A]; classes in the order of their category ids. Rows of images are those of
        their sorted ids.
    """
    row_of = {image: row for row, image in enumerate(sorted(coco.imgs))}
    objects, found = defaultdict(list), defaultdict(list)
    for annotation in coco.dataset["annotations"]:
        objects[annotation["category_id"]].append(annotation)
    for detection in detections:
        found[detection["category_id"]].append(dict(detection))
    # One class at a time: pycocotools' records of all of them together take gigabytes.
    return [_match_class(coco, c, objects[c], found[c], row_of) for c in sorted(coco.cats)]


def _match_class(
    coco: COCO,
    category: Any,
    objects: list[dict[str, Any]],
    detections: list[dict[str, Any]],
    row_of: Mapping[Any, int],
) -> list[Outcomes]:
    """Outcomes [A] of one class."""
    images = {a["image_id"] for a in objects} & row_of.keys()
    part = COCO()
    part.dataset = {
        "images": [coco.imgs[i] for i in sorted(images)],
        "annotations": objects,
        "categories": [coco.cats[category]],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        part.createIndex()
        found = load_results(part, [d for d in detections if d["image_id"] in images])
        evaluation = ignoring_difficult(COCOeval)(part, found, "bbox")
        evaluation.evaluate()
    # Most images have no object of a class: nothing to match, and pycocotools takes long to tell.
    without = [d for d in detections if d["image_id"] not in images]
    outcomes = []
    for a, area in enumerate(evaluation.params.areaRng):
        # The flat list of records has the images of one range of area after those of the other.
        records = evaluation.evalImgs[a * len(images) :][: len(images)]
        matched = _outcomes([r for r in records if r is not None], row_of)
        outcomes.append(_joined(matched, _unmatched(without, row_of, area)))
    return outcomes


def _unmatched(
    detections: Sequence[Mapping[str, Any]], row_of: Mapping[Any, int], area: Sequence[float]
) -> Outcomes:
    """Outcomes of detections where there is no object: wrong, or out of the range of area."""
    scores = np.array([d["score"] for d in detections], float)
    images = np.array([row_of[d["image_id"]] for d in detections], np.int32)
    areas = np.array([d["bbox"][2] * d["bbox"][3] for d in detections], float)
    order = np.lexsort((-scores, images))  # stable
    scores, images, areas = scores[order], images[order], areas[order]
    rank = np.arange(len(images)) - np.searchsorted(images, images)
    keep = (rank < MAX_DETECTIONS) & (areas >= area[0]) & (areas <= area[1])
    nothing = np.zeros((len(IOU_PERCENT), int(keep.sum())), bool)
    return Outcomes(scores[keep], images[keep], nothing, nothing, np.zeros(0, np.int32))


def _joined(a: Outcomes, b: Outcomes) -> Outcomes:
    """The outcomes of different images, in the order of the images."""
    order = np.argsort(np.concatenate([a.images, b.images]), kind="stable")
    columns = [
        np.concatenate([x, y], axis=-1)[..., order] for x, y in zip(a[:4], b[:4], strict=True)
    ]
    return Outcomes._make([*columns, np.concatenate([a.objects, b.objects])])


def _outcomes(records: Sequence[Mapping[str, Any]], row_of: Mapping[Any, int]) -> Outcomes:
    """Join COCOeval's records of the images of one class and range of area."""
    empty = np.zeros((len(IOU_PERCENT), 0), bool)
    rows = np.array([row_of[r["image_id"]] for r in records], np.int32)
    scores = np.concatenate([np.zeros(0), *(r["dtScores"] for r in records)])
    images = np.repeat(rows, [len(r["dtScores"]) for r in records])
    objects = np.repeat(rows, [int((np.asarray(r["gtIgnore"]) == 0).sum()) for r in records])
    matched = np.concatenate([empty, *(r["dtMatches"] > 0 for r in records)], axis=1)
    ignored = np.concatenate([empty, *(r["dtIgnore"].astype(bool) for r in records)], axis=1)
    keep = ~ignored.all(axis=0)
    right = matched & ~ignored
    return Outcomes(scores[keep], images[keep], right[:, keep], ignored[:, keep], objects)


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
