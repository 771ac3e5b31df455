"""Ground truth and detections in COCO's formats: read, checked and renumbered once, for everybody.

Letters: N images, K classes, D detections, G objects. Boxes are XYXY in absolute coordinates.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.coco_format import load_json, read_coco_json
from ..data.voc import check_difficult_policy
from ..errors import UserError

Array = NDArray[Any]
Rows = list[dict[str, Any]]

MAX_DETECTIONS = 100  # COCO's limit, of an image and class
_LARGEST = 1e100  # areas and sums of such numbers are finite
_FIELDS = {"image_id", "category_id", "bbox", "score"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroundTruth:
    """The objects of a data set, sorted by class and image; of one group in the file's order."""

    boxes: Array  #: (G, 4) float64
    box_areas: Array  #: (G,) float64, width times height as the file has them
    areas: Array  #: (G,) float64, of the object; by these it is small, medium or large
    group: Array  #: (G,) int64, class * N + image, rising; rows of images and classes as below
    crowd: Array  #: (G,) bool, COCO's crowds
    ignored: Array  #: (G,) bool, crowds and objects marked "difficult", neither right nor missed
    images: Sequence[dict[str, Any]]  #: N images of the file ("id", "file_name", ...), by id
    classes: Sequence[str]  #: K names, by category id
    image_rows: dict[Any, int]  #: image id -> row of ``images``
    category_rows: dict[Any, int]  #: category id -> row of ``classes``

    @property
    def label(self) -> Array:
        """(G,) int64, row of the class."""
        return self.group // len(self.images)

    @property
    def image(self) -> Array:
        """(G,) int64, row of the image."""
        return self.group % len(self.images)


@dataclass(frozen=True)
class Detections:
    """The detections on such a data set, at most 100 of each image and class."""

    boxes: Array  #: (D, 4) float64
    areas: Array  #: (D,) float64, width times height as the file has them
    scores: Array  #: (D,) float64
    #: (D,) int64 as in :class:`GroundTruth`, rising; within a group the best score first.
    group: Array
    rank: Array  #: (D,) int64, place within the group, from 0
    label: Array  #: (D,) int64, row of the class
    image: Array  #: (D,) int64, row of the image

    def __len__(self) -> int:
        return len(self.scores)

    def of_class(self, k: int) -> slice:
        """The rows of class ``k``; they are in the order of the images."""
        return slice(*np.searchsorted(self.label, (k, k + 1)))


def read_ground_truth(json_file: str, difficult: str = "ignore") -> GroundTruth:
    """Read annotations in COCO's instance format.

    Args:
        json_file: its path. Ids may be any numbers or texts; those of annotations aren't used.
        difficult: the policy for objects marked "difficult": "ignore" (neither right nor wrong
            nor missed), "count" (as any object) or "drop" (as if not annotated).

    Returns:
        the objects.

    Raises:
        UserError: if the file can't be read or is not of that format, an annotation names an
            image or category that the file lacks, or the policy is not known.
    """
    check_difficult_policy(difficult)
    raw = load_json(json_file)
    content = read_coco_json(json_file, raw)
    if unknown := content["info"]["problems"].get("unknown category"):
        raise UserError(f"{json_file}: {unknown[0]} is not among the categories")
    odd = content["info"]["problems"].get("not finite")
    if odd and raw.get("info") != content["info"]:  # of a clean file check_datasets has said it
        logger.warning(f"{json_file}: {len(odd)} x not finite, left out: {odd[0]}")
    images = sorted(content["images"], key=lambda image: image["id"])
    categories, rows = content["categories"], content["annotations"]
    places = [{row["id"]: i for i, row in enumerate(part)} for part in (images, categories)]
    boxes, box_areas = _boxes(rows, f"{json_file}: annotations")
    image, label = (
        np.array([place[row[key]] for row in rows], np.int64)
        for key, place in zip(("image_id", "category_id"), places, strict=True)
    )
    crowd, marked = (
        np.array([row.get(key, 0) for row in rows], bool) for key in ("iscrowd", "difficult")
    )
    group = label * len(images) + image
    order = np.argsort(group, kind="stable")
    if difficult == "drop":
        order = order[~marked[order]]
    return GroundTruth(
        boxes=boxes[order],
        box_areas=box_areas[order],
        areas=np.array([row["area"] for row in rows], np.float64)[order],
        group=group[order],
        crowd=crowd[order],
        ignored=(crowd | marked if difficult == "ignore" else crowd)[order],
        images=images,
        classes=[category["name"] for category in categories],
        image_rows=_known_ids(images, raw["images"]),
        category_rows=_known_ids(categories, raw["categories"]),
    )


def _known_ids(rows: Rows, of_file: Rows) -> dict[Any, int]:
    """Id -> place, by the ids that detections may have: the file's, and others that don't clash."""
    original = {row.get("original_id", row["id"]): i for i, row in enumerate(rows)}
    ours = {row["id"]: i for i, row in enumerate(rows)}
    own, others = original, ours
    if ours.keys() == {row["id"] for row in of_file}:
        own, others = ours, original
    return own if own.keys() & others.keys() else {**others, **own}


def read_detections(
    json_file: str, ground_truth: GroundTruth, *, probabilities: bool = False
) -> Detections:
    """Read a JSON list of detections in COCO's result format.

    Args:
        json_file: its path.
        ground_truth: of the same data set.
        probabilities: whether scores must lie between 0 and 1; else any finite number will do.

    Returns:
        the detections; of those of equal score the one first in the file comes first.

    Raises:
        UserError: naming the file and the record, if the file is not such a list, or a detection
            names an image or category that the ground truth lacks, or has a bad box or score.
    """
    rows = load_json(json_file)
    return make_detections(rows, ground_truth, json_file, probabilities=probabilities)


def make_detections(
    rows: Any,
    ground_truth: GroundTruth,
    source: str,
    *,
    probabilities: bool = False,
    limit: int | None = MAX_DETECTIONS,
) -> Detections:
    """Detections from the list that such a file holds; see :func:`read_detections`.

    Args:
        rows: list of dicts with "image_id", "category_id", "bbox" (XYWH) and "score".
        ground_truth: of the same data set.
        source: what messages call the list, e.g. its file.
        probabilities: whether scores must lie between 0 and 1.
        limit: of an image and class, the best-scored ones; None for none.

    Raises:
        UserError: see :func:`read_detections`.
    """
    if not isinstance(rows, list):
        raise UserError(f"{source}: not a list of detections (COCO's result format)")
    where = f"{source}: detections"
    for i, row in enumerate(rows):
        missing = _FIELDS - row.keys() if isinstance(row, dict) else _FIELDS
        if missing:
            raise UserError(f"{where}[{i}] has no {min(missing)!r}")
    image = _rows_of(rows, "image_id", ground_truth.image_rows, where, "images")
    label = _rows_of(rows, "category_id", ground_truth.category_rows, where, "categories")
    boxes, areas = _boxes(rows, where)
    scores = _scores(rows, where, probabilities)
    group = label * len(ground_truth.images) + image
    order = np.lexsort((-scores, group))  # stable
    rank = _rank_in_group(group[order])
    kept = slice(None) if limit is None else rank < limit
    order, rank = order[kept], rank[kept]
    boxes, areas, scores, group, label, image = (
        column[order] for column in (boxes, areas, scores, group, label, image)
    )
    return Detections(boxes, areas, scores, group, rank, label, image)


def _rank_in_group(group: Array) -> Array:
    """Place of each row within its run of equal groups, from 0."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(first, append=len(group))
    return np.arange(len(group)) - np.repeat(first, sizes)


def _rows_of(rows: Rows, key: str, known: dict[Any, int], where: str, section: str) -> Array:
    """The row each id stands for; ids of 3 and 3.0 are the same."""
    for i, row in enumerate(rows):
        if type(row[key]) not in (int, float, str) or row[key] not in known:
            shown = ", ".join(map(repr, list(known)[:3])) + (", ..." if len(known) > 3 else "")
            raise UserError(
                f"{where}[{i}]: {key} {row[key]!r} is not among the ground truth's {section} "
                f"(which are {shown or 'none'}): is it of this data set?"
            )
    return np.array([known[row[key]] for row in rows], np.int64)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST


def _boxes(rows: Rows, where: str) -> tuple[Array, Array]:
    """(n, 4) XYXY of the "bbox" (XYWH) of each row, and (n,) areas; float64.

    Areas are of the file's widths and heights: those of the corners are off in the last bit, and
    with them an IoU that should equal a threshold.
    """
    for i, row in enumerate(rows):
        box = row["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
            raise UserError(
                f"{where}[{i}]: bbox must be 4 finite numbers (x, y, width, height), got {box!r}"
            )
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    areas = boxes[:, 2] * boxes[:, 3]
    boxes[:, 2:] += boxes[:, :2]
    return boxes, areas


def _scores(rows: Rows, where: str, probabilities: bool) -> Array:
    """(n,) float64."""
    for i, row in enumerate(rows):
        score = row["score"]
        if not _is_finite(score):
            raise UserError(f"{where}[{i}]: score {score!r} is not a finite number")
        if probabilities and not 0 <= score <= 1:
            raise UserError(
                f"{where}[{i}]: score {score!r} is not between 0 and 1; turn logits and "
                "percentages into probabilities first"
            )
    return np.array([row["score"] for row in rows], np.float64)
