"""Ground truth and detections of COCO form as arrays, whoever made them.

Letters: N images, K classes, D detections, G objects. Boxes are XYXY in absolute coordinates.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.coco_format import read_coco_json
from ..errors import UserError

Array = NDArray[Any]

# COCO's limit of detections an image and class.
MAX_DETECTIONS = 100
_NUMBERS = {int, float}
_FIELDS = {"image_id", "category_id", "bbox", "score"}


@dataclass(frozen=True)
class GroundTruth:
    """The objects of a data set, sorted by class and image.

    Attributes:
        boxes: (G, 4) float64.
        group: (G,) int64, class * N + image, rising; rows of images and classes as below.
        crowd: (G,) bool, COCO's crowds.
        ignored: (G,) bool, crowds and objects marked "difficult": neither right nor missed.
        images: N images of the file ("id", "file_name", ...), by id.
        classes: K names, in the order of their category ids.
        category_rows: category id -> row of ``classes``.
        image_rows: image id -> row of ``images``.
    """

    boxes: Array
    group: Array
    crowd: Array
    ignored: Array
    images: Sequence[dict[str, Any]]
    classes: Sequence[str]
    category_rows: dict[Any, int]
    image_rows: dict[Any, int]

    def num_objects(self) -> Array:
        """Number of objects to find of each class, (K,) int64."""
        label = self.group[~self.ignored] // max(len(self.images), 1)
        return np.bincount(label, minlength=len(self.classes))


@dataclass(frozen=True)
class Detections:
    """The detections on such a data set, at most 100 of each image and class.

    Attributes:
        boxes: (D, 4) float64.
        scores: (D,) float64 in [0, 1].
        group: (D,) int64 as in :class:`GroundTruth`, rising; within a group the best score first.
        rank: (D,) int64, place within the group, from 0.
        label: (D,) int64, row of the class.
        image: (D,) int64, row of the image.
    """

    boxes: Array
    scores: Array
    group: Array
    rank: Array
    label: Array
    image: Array

    def __len__(self) -> int:
        return len(self.scores)


def read_ground_truth(json_file: str) -> GroundTruth:
    """Read annotations in COCO's instance format.

    Args:
        json_file: its path.

    Returns:
        the objects.

    Raises:
        UserError: if the file can't be read, is not of that format, or an annotation speaks of an
            image or category that is not there.
    """
    content = read_coco_json(json_file)
    images = list({image["id"]: image for image in content["images"]}.values())
    categories = sorted(content["categories"], key=lambda c: c["id"])
    image_rows = {image["id"]: row for row, image in enumerate(images)}
    category_rows = {category["id"]: row for row, category in enumerate(categories)}
    rows = content["annotations"]
    where = f"{json_file}: annotations"
    image = _rows_of(rows, "image_id", image_rows, where, "images")
    label = _rows_of(rows, "category_id", category_rows, where, "categories")
    crowd = np.array([bool(a.get("iscrowd")) for a in rows], bool)
    ignored = crowd | np.array([bool(a.get("difficult")) for a in rows], bool)
    group = label * max(len(images), 1) + image
    order = np.argsort(group, kind="stable")
    return GroundTruth(
        boxes=_boxes(rows, where)[order],
        group=group[order],
        crowd=crowd[order],
        ignored=ignored[order],
        images=images,
        classes=[category["name"] for category in categories],
        category_rows=category_rows,
        image_rows=image_rows,
    )


def read_detections(json_file: str, ground_truth: GroundTruth) -> Detections:
    """Read a JSON list of detections in COCO's result format.

    Args:
        json_file: its path.
        ground_truth: of the same data set.

    Returns:
        the detections; of those of equal score the one first in the file comes first.

    Raises:
        UserError: if the file is not such a list, or a detection speaks of an image or category
            that the ground truth lacks, or its score is not between 0 and 1.
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            rows = json.load(f)
    except OSError as error:
        raise UserError(f"{json_file}: can't be read: {error.strerror}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{json_file}: not a JSON file: {error}") from error
    return make_detections(rows, ground_truth, json_file)


def make_detections(rows: Any, ground_truth: GroundTruth, source: str) -> Detections:
    """Detections from the list that such a file holds; see :func:`read_detections`.

    Args:
        rows: list of dicts with "image_id", "category_id", "bbox" (XYWH) and "score".
        ground_truth: of the same data set.
        source: what messages call the list, e.g. its file.

    Raises:
        UserError: see :func:`read_detections`.
    """
    if not isinstance(rows, list):
        raise UserError(f"{source}: not a list of detections (COCO's result format)")
    for i, row in enumerate(rows):
        if not (isinstance(row, dict) and row.keys() >= _FIELDS):
            missing = sorted(_FIELDS - (row.keys() if isinstance(row, dict) else set()))
            raise UserError(f"{source}: detection {i} has no {missing[0]!r}")
    image = _rows_of(rows, "image_id", ground_truth.image_rows, f"{source}: detection", "images")
    label = _rows_of(
        rows, "category_id", ground_truth.category_rows, f"{source}: detection", "categories"
    )
    boxes, scores = _boxes(rows, f"{source}: detection"), _scores(rows, source)
    group = label * max(len(ground_truth.images), 1) + image
    order = np.lexsort((-scores, group))  # stable
    rank = _rank_in_group(group[order])
    kept = rank < MAX_DETECTIONS
    order = order[kept]
    return Detections(
        boxes[order], scores[order], group[order], rank[kept], label[order], image[order]
    )


def _rank_in_group(group: Array) -> Array:
    """Place of each row within its run of equal groups, from 0."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(first, append=len(group))
    return np.arange(len(group)) - np.repeat(first, sizes)


def _rows_of(
    rows: list[dict[str, Any]], key: str, known: dict[Any, int], where: str, section: str
) -> Array:
    """The row each id stands for; ids of 3 and 3.0 are the same."""
    found = []
    for i, row in enumerate(rows):
        value = row[key]
        if isinstance(value, dict | list) or value not in known:
            raise UserError(
                f"{where}[{i}]: {key} {value!r} is not among the ground truth's {section} "
                f"(which are {_examples(known)}): is it of this data set?"
            )
        found.append(known[value])
    return np.array(found, np.int64)


def _examples(known: dict[Any, int]) -> str:
    shown = ", ".join(repr(key) for key in list(known)[:3])
    return shown + (", ..." if len(known) > 3 else "") if known else "none"


def _boxes(rows: list[dict[str, Any]], where: str) -> Array:
    """(n, 4) XYXY float64 of the "bbox" (XYWH) of each row."""
    for i, row in enumerate(rows):
        box = row["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and _NUMBERS.issuperset(map(type, box))):
            raise UserError(_bad_box(where, i, box))
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    if not finite.all():
        first = int(finite.argmin())
        raise UserError(_bad_box(where, first, rows[first]["bbox"]))
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _bad_box(where: str, i: int, box: Any) -> str:
    return f"{where}[{i}]: bbox must be 4 finite numbers (x, y, width, height), got {box!r}"


def _scores(rows: list[dict[str, Any]], source: str) -> Array:
    for i, row in enumerate(rows):
        score = row["score"]
        if type(score) not in _NUMBERS or not 0 <= score <= 1:
            raise UserError(
                f"{source}: detection {i}: score {score!r} is not a number between 0 and 1; "
                "logits and percentages must be turned into probabilities first"
            )
    return np.array([row["score"] for row in rows], np.float64)
