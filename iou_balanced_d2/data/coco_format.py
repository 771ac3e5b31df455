"""COCO's instance format as people write it, read into one clean form.

Faults with a clear meaning are repaired and counted; others are refused with their place.
Segmentations and keypoints are ignored, as a detector of boxes needs boxes only.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from ..errors import UserError
from .formats import hint_for_folder, hint_for_json, hint_for_text

# Above this COCOeval, which keeps ids in float64, takes two ids for one.
_MAX_ID = 2**53
_MAX_PIXEL = 2**53  # what is beyond it, or NaN, is no position in an image
_MAX_AREA = 1e10  # square pixels; COCO evaluates no object above it
_MAX_BYTES = 2**31  # of an unpacked .json.gz
_KINDS = {int: "a whole number", float: "a number", str: "a text"}
_REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {
        "id": (int, str), "file_name": (str,), "height": (int, float), "width": (int, float),
    },
    "annotations": {"image_id": (int, str), "category_id": (int, str), "bbox": (list,)},
    "categories": {"id": (int, str), "name": (str,)},
}  # fmt: skip
_CROWD = {"0": 0, "1": 1, "false": 0, "true": 1, "none": 0, "null": 0, "": 0}

# An id's text -> the id and its number: 1 and "1" are the same.
Ids = dict[str, tuple[Any, int]]

# Kind of repair -> what is done.
REPAIRS = {
    "annotation id": "missing, used twice, or no positive whole number: all are numbered anew",
    "image id": "not all are whole numbers from 0 on: all are numbered anew",
    "category id": "not all are whole numbers from 0 on: all are numbered anew",
    "area": "missing, or no positive number up to 1e10: the box's area is taken",
    "iscrowd": "neither 0 nor 1: read as one of them",
    "ignore": "objects to be ignored: taken for difficult ones, see DATASETS.VOC_DIFFICULT",
    "reference": "image_id or category_id is a number in one place and a text in the other",
    "file_name": "backslashes are taken for slashes",
}


class _Found:
    """What was repaired (number and first place), and what points to nothing (all places)."""

    def __init__(self, info: Any) -> None:
        # A clean file, read again, has the account of its making.
        self.is_clean = isinstance(info, dict) and info.keys() >= {"repairs", "problems"}
        known = info if self.is_clean else {}
        self.repairs: dict[str, list[Any]] = dict(known.get("repairs", {}))
        self.problems: dict[str, list[str]] = dict(known.get("problems", {}))

    def repaired(self, kind: str, place: str) -> None:
        self.repairs.setdefault(kind, [0, place])[0] += 1

    def left_out(self, kind: str, i: int, raw: dict[str, Any], reason: str) -> None:
        place = f"annotations[{i}] (id {_shown(raw.get('id'))}): {reason}"
        self.problems.setdefault(kind, []).append(place)


def load_json(path: str) -> Any:
    """Read a JSON file: UTF-8 or UTF-16 with or without byte order mark, also packed by gzip."""
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as f:
                data = f.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise UserError(f"{path}: over {_MAX_BYTES >> 30} GiB when unpacked; unpack it")
        # (json.loads finds out about UTF-16 and UTF-32, but refuses the mark of UTF-8.)
        return json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        hint = hint_for_folder(path)
        raise UserError(f"{path}: can't be read: {error.strerror or error}{hint}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be annotations or detections") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        hint = hint_for_text(data[:1000])
        raise UserError(f"{path}: not a JSON file: {error}{hint}") from error


def read_coco_json(json_file: str, content: Any = None) -> dict[str, Any]:
    """Read annotations in COCO's instance format into a clean form.

    Images have "id", "file_name", "width" and "height"; annotations "id" from 1 on, "image_id" and
    "category_id" of an image and a category, "bbox" (4 finite numbers, XYWH pixels), "area",
    "iscrowd" (0 or 1), and "difficult" (0 or 1) where the file says so; categories "id" and
    "name". Ids of images and categories are kept if they are whole numbers from 0 on. Otherwise
    they are numbered in their order, numbers before texts, and "original_id" is what they were.
    "info" has "repairs", kind in :data:`REPAIRS` -> [number, first place], and "problems", "unknown
    image", "unknown category" or "not finite" -> places of annotations that are left out.
    """
    try:
        return clean_coco(load_json(json_file) if content is None else content)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(json_file) else f"{json_file}: {text}") from error


def clean_coco(content: Any) -> dict[str, Any]:
    """The clean form of :func:`read_coco_json`; what was given is not changed."""
    _check_form(content)
    found = _Found(content.get("info"))
    image_ids = _ids("images", content["images"], found)
    category_ids = _ids("categories", content["categories"], found)
    images = [_image(raw, i, image_ids, found) for i, raw in enumerate(content["images"])]
    files = {image["id"]: image["file_name"] for image in images}
    annotations = [
        annotation
        for i, raw in enumerate(content["annotations"])
        if (annotation := _annotation(raw, i, image_ids, category_ids, files, found))
    ]
    _number(annotations, found)
    return {
        "info": {"repairs": found.repairs, "problems": found.problems},
        "images": images,
        "annotations": annotations,
        # In detectron2's order of the classes.
        "categories": sorted(
            (
                {**_id_of(raw, category_ids, found), "name": raw["name"]}
                for raw in content["categories"]
            ),
            key=lambda category: category["id"],
        ),
    }


def class_names(content: dict[str, Any]) -> list[str]:
    """The classes of clean content, in the order in which detectron2 numbers them."""
    return [c["name"] for c in content["categories"]]


def _check_form(content: Any) -> None:
    """Make sure that the lists are there, with the fields needed, of the types needed."""
    for section, fields in _REQUIRED.items():
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(
                f"not in COCO format: it has no list {section!r}{hint_for_json(content)}"
            )
        for i, row in enumerate(rows):
            for field, allowed in fields.items():
                if not isinstance(row, dict) or field not in row:
                    raise UserError(f"not in COCO format: {section}[{i}] has no {field!r}")
                if type(row[field]) not in allowed and field != "bbox":
                    kinds = " or ".join(_KINDS[kind] for kind in allowed)
                    raise UserError(
                        f"{section}[{i}]: {field} must be {kinds}, got {_shown(row[field])}"
                    )
    for section in ("images", "categories"):
        if not content[section]:
            raise UserError(f"the list {section!r} is empty")


def _shown(value: Any) -> str:
    """A value in an error, of bounded length."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of over 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ids(section: str, rows: list[dict[str, Any]], found: _Found) -> Ids:
    """Each id and its number."""
    places: dict[str, int] = {}
    for i, row in enumerate(rows):
        first = places.setdefault(str(row["id"]), i)
        if first != i:
            raise UserError(
                f"{section}[{first}] and [{i}] have the same id {_shown(row['id'])}; "
                "give each its own"
            )
    odd = [(i, r["id"]) for i, r in enumerate(rows) if not _is_id(r["id"], least=0)]
    if not odd:
        return {str(row["id"]): (row["id"], row["id"]) for row in rows}
    for i, id_ in odd:
        found.repaired("image id" if section == "images" else "category id",
                       f"{section}[{i}]: {_shown(id_)}")  # fmt: skip
    ordered = sorted((type(row["id"]) is str, row["id"]) for row in rows)
    return {str(id_): (id_, number) for number, (_, id_) in enumerate(ordered, start=1)}


def _is_id(value: Any, *, least: int) -> bool:
    return type(value) is int and least <= value < _MAX_ID


def _id_of(raw: dict[str, Any], ids: Ids, found: _Found) -> dict[str, Any]:
    """The id of an image or category, and what it was in the user's file if that differs."""
    number = ids[str(raw["id"])][1]
    # In a user's file the field is the user's own, of any meaning.
    original = raw.get("original_id", raw["id"]) if found.is_clean else raw["id"]
    return {"id": number} if original == number else {"id": number, "original_id": original}


def _image(raw: dict[str, Any], i: int, ids: Ids, found: _Found) -> dict[str, Any]:
    width, height, name = raw["width"], raw["height"], raw["file_name"]
    if not (1 <= width <= 2**31 and 1 <= height <= 2**31):
        raise UserError(
            f"images[{i}]: the size is {_shown(width)} x {_shown(height)}; write the true one"
        )
    if not name or "\0" in name:
        raise UserError(f"images[{i}]: file_name is {_shown(name)}; write the file's name")
    if "\\" in name:
        found.repaired("file_name", f"images[{i}]: {name}")
        name = name.replace("\\", "/")
    size = {"width": int(width), "height": int(height)}
    return {**_id_of(raw, ids, found), "file_name": name, **size}


def _annotation(
    raw: dict[str, Any],
    i: int,
    image_ids: Ids,
    category_ids: Ids,
    files: dict[int, str],
    found: _Found,
) -> dict[str, Any] | None:
    """The clean annotation; None if its image or category is unknown, or its box not finite."""
    image_id = _refer(raw, "image_id", image_ids, i, found)
    category_id = _refer(raw, "category_id", category_ids, i, found)
    if image_id is None or category_id is None:
        return None
    box = _box(raw["bbox"], i)
    if not all(abs(v) < _MAX_PIXEL for v in box):
        found.left_out("not finite", i, raw, f"box {_shown(box)} of {files[image_id]!r}")
        return None
    annotation = {
        "id": raw.get("id"),
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": raw.get("area"),
        "iscrowd": _flag(raw, "iscrowd", i, found),
    }
    annotation["area"] = area = area_of(annotation)
    if raw.get("area") != area:
        found.repaired("area", f"annotations[{i}]: {_shown(raw.get('area'))}")
    difficult = _flag(raw, "difficult", i, found)
    if _flag(raw, "ignore", i, found) and not annotation["iscrowd"]:
        found.repaired("ignore", f"annotations[{i}]")
        difficult = 1
    return {**annotation, "difficult": 1} if difficult else annotation


def _refer(raw: dict[str, Any], field: str, ids: Ids, i: int, found: _Found) -> int | None:
    """The number of the image or category that an annotation names."""
    value = raw[field]
    if str(value) not in ids:
        kind = "unknown image" if field == "image_id" else "unknown category"
        found.left_out(kind, i, raw, f"{field} {_shown(value)}")
        return None
    id_, number = ids[str(value)]
    if type(id_) is not type(value):
        found.repaired("reference", f"annotations[{i}]: {field} {_shown(value)}")
    return number


def _box(value: Any, i: int) -> list[float]:
    numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    if not (numbers and len(value) == 4):
        raise UserError(
            f"annotations[{i}]: bbox must be 4 numbers (x, y, width, height), got {_shown(value)}"
        )
    return list(value)


def area_of(annotation: dict[str, Any]) -> float:
    """The "area" by which COCO calls an object small, medium or large, or else its "bbox"'s."""
    value, (_, _, width, height) = annotation.get("area"), annotation["bbox"]
    if isinstance(value, int | float) and type(value) is not bool and 0 < value <= _MAX_AREA:
        return float(value)
    return float(max(width, 0.0) * max(height, 0.0))


def _flag(raw: dict[str, Any], field: str, i: int, found: _Found) -> int:
    """A field that is 0 or 1, 0 where it is missing."""
    value = raw.get(field, 0)
    if type(value) in (int, float, bool) and value in (0, 1):
        return int(value)
    text = value.strip().lower() if isinstance(value, str) else "none" if value is None else "?"
    if text not in _CROWD:
        raise UserError(f"annotations[{i}]: {field} must be 0 or 1, got {_shown(value)}")
    found.repaired(
        "iscrowd" if field == "iscrowd" else "ignore", f"annotations[{i}]: {_shown(value)}"
    )
    return _CROWD[text]


def _number(annotations: list[dict[str, Any]], found: _Found) -> None:
    """Number the annotations from 1, unless their ids are good.

    COCOeval stores a detection's match as the object's id, and 0 for no match: a match with the
    object 0 would be lost.
    """
    ids = [a["id"] for a in annotations]
    good = [_is_id(id_, least=1) for id_ in ids]
    seen: set[Any] = set()
    for i, id_ in enumerate(ids):
        if not good[i] or id_ in seen:
            found.repaired("annotation id", f"annotations[{i}]: {_shown(id_)}")
        if good[i]:
            seen.add(id_)
    if "annotation id" in found.repairs:
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
