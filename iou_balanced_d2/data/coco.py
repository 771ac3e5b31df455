"""Data sets of one's own: annotations in COCO's JSON format and a folder of images."""

import json
import math
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError
from .names import check_name
from .voc import register_voc_folder

_KINDS = {int: "a whole number", float: "a number", str: "a text"}
_ID, _SIZE = (int, str), (int, float)


def register_coco_json(name: str, json_file: str, image_root: str) -> None:
    """Register a data set of COCO form under ``name``, for DATASETS.TRAIN and DATASETS.TEST.

    Nothing is read before the data set is used. Registering the same set again does nothing.

    Args:
        name: the data set's name in the config.
        json_file: annotations in COCO's instance format.
        image_root: folder that the images' ``file_name`` are relative to.

    Raises:
        UserError: if the name is taken by another data set, or can't name a folder.
    """
    check_name(name, "DATASETS.COCO_JSON")
    if name not in DatasetCatalog:
        register_coco_instances(name, {}, json_file, image_root)
        return
    known = MetadataCatalog.get(name)
    if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
        raise UserError(f"DATASETS.COCO_JSON: the name {name!r} is taken; choose another one")


def register_datasets_of(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.COCO_JSON`` and ``VOC_FOLDER``; every process needs to.

    Raises:
        UserError: if an entry is not of the key's form, or its name is taken.
    """
    for entry in cfg.DATASETS.COCO_JSON:
        if not (isinstance(entry, (list, tuple)) and [type(x) for x in entry] == [str] * 3):
            raise UserError(
                f"DATASETS.COCO_JSON: expected [name, json file, image folder], got {entry!r}"
            )
        register_coco_json(*entry)
    for entry in cfg.DATASETS.VOC_FOLDER:
        if not _is_voc_entry(entry):
            raise UserError(
                "DATASETS.VOC_FOLDER: expected [name, folder, split] or "
                f"[name, folder, split, [class names]], got {entry!r}"
            )
        register_voc_folder(*entry)


def _is_voc_entry(entry: Any) -> bool:
    if not (isinstance(entry, (list, tuple)) and len(entry) in (3, 4)):
        return False
    texts = [*entry[:3]]
    if len(entry) == 4:
        if not isinstance(entry[3], (list, tuple)):
            return False
        texts += entry[3]
    return all(isinstance(text, str) for text in texts)


def read_coco_json(json_file: str) -> dict[str, Any]:
    """Read a JSON file and make sure that it is of COCO's instance format.

    Args:
        json_file: its path.

    Returns:
        its content, with lists "images", "annotations" and "categories".

    Raises:
        UserError: if it can't be read, is no JSON, or is not of COCO's format.
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            content = json.load(f)
    except OSError as error:
        raise UserError(f"{json_file}: can't be read: {error.strerror}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{json_file}: not a JSON file: {error}") from error
    needed = {
        "images": {"id", "file_name", "height", "width"},
        "annotations": {"image_id", "category_id", "bbox"},
        "categories": {"id", "name"},
    }
    for section, fields in needed.items():
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"{json_file}: not in COCO format: it has no list {section!r}")
        for i, row in enumerate(rows):
            missing = fields - row.keys() if isinstance(row, dict) else fields
            if missing:
                raise UserError(
                    f"{json_file}: not in COCO format: {section}[{i}] has no {min(missing)!r}"
                )
    _check_types(json_file, content)
    for i, annotation in enumerate(content["annotations"]):
        if not _is_box(annotation["bbox"]):
            raise UserError(
                f"{json_file}: annotations[{i}]: bbox must be 4 numbers (x, y, width, height), got "
                f"{annotation['bbox']!r}"
            )
    return content


def _check_types(json_file: str, content: dict[str, Any]) -> None:
    """Make sure of what nothing else looks at before it is used."""
    expected: dict[str, dict[str, tuple[type, ...]]] = {
        "images": {"id": _ID, "file_name": (str,), "height": _SIZE, "width": _SIZE},
        "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID},
        "categories": {"id": _ID, "name": (str,)},
    }
    for section, types in expected.items():
        for i, row in enumerate(content[section]):
            for field, allowed in types.items():
                if field in row and type(row[field]) not in allowed:
                    names = " or ".join(_KINDS[kind] for kind in allowed)
                    raise UserError(
                        f"{json_file}: {section}[{i}]: {field} must be {names}, got {row[field]!r}"
                    )
    for i, image in enumerate(content["images"]):
        if not (1 <= image["height"] < math.inf and 1 <= image["width"] < math.inf):
            raise UserError(
                f"{json_file}: images[{i}]: the size is {image['width']} x {image['height']}; "
                "write the true one"
            )


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    )


def class_names(content: dict[str, Any]) -> list[str]:
    """The classes in the order of their category ids, as detectron2 numbers them."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def check_folder(image_root: str) -> None:
    """Make sure that the image folder is there.

    Raises:
        UserError: if it is not.
    """
    if not os.path.isdir(image_root):
        raise UserError(f"image folder {image_root!r} not found")


def check_image_folder(image_root: str, content: dict[str, Any], json_file: str) -> None:
    """Make sure that the image folder is there and is the one the annotations speak of.

    Raises:
        UserError: if the folder, or the first image named by the annotations, is missing.
    """
    check_folder(image_root)
    if content["images"]:
        first = content["images"][0]["file_name"]
        if not os.path.isfile(os.path.join(image_root, first)):
            raise UserError(f"image {first!r} of {json_file} is not in the folder {image_root!r}")
