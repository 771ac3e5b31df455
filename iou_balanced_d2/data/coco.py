"""Data sets of one's own: annotations in COCO's JSON format and a folder of images."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from detectron2.config import CfgNode

from ..errors import UserError
from . import coco_format
from .coco_format import read_coco_json
from .conversion import register_converted, source_digest, stamp
from .voc import register_voc_folder
from .yolo import register_yolo_folder

_CODE = source_digest(__file__, coco_format.__file__)


@dataclass(frozen=True)
class CocoSource:
    """A JSON file in COCO's format, which is read into a clean form.

    detectron2 leaves out boxes whose segmentation is faulty, and other irregular fields make it
    fail after the training. It therefore gets the clean form of :func:`read_coco_json`.
    """

    path: str  # annotations in COCO's instance format
    image_root: str  # folder that the images' ``file_name`` are relative to
    metadata: ClassVar[dict[str, Any]] = {}  # nothing is known before the file is read

    def fingerprint(self) -> list[Any]:
        """The file, its size and time of change."""
        return [_CODE, os.path.basename(self.path), *stamp(self.path)]

    def convert(self) -> dict[str, Any]:
        """The clean form."""
        return read_coco_json(self.path)


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
    register_converted(name, CocoSource(json_file, image_root), key="DATASETS.COCO_JSON")


def register_datasets_of(cfg: CfgNode) -> None:
    """Register the config's own data sets; every process needs to.

    They are those of ``DATASETS.COCO_JSON``, ``VOC_FOLDER`` and ``YOLO_FOLDER``.

    Raises:
        UserError: if an entry is not of the key's form, or its name is taken.
    """
    for key, register, form in (
        ("COCO_JSON", register_coco_json, "[name, json file, image folder]"),
        ("YOLO_FOLDER", register_yolo_folder, "[name, data.yaml, split]"),
        ("VOC_FOLDER", register_voc_folder,
         "[name, folder, split] or [name, folder, split, [class names]]"),
    ):  # fmt: skip
        for entry in cfg.DATASETS[key]:
            texts = entry
            if key == "VOC_FOLDER" and isinstance(entry, (list, tuple)) and len(entry) == 4:
                texts = entry[:3] if _are_texts(entry[3]) else ()
            if not (_are_texts(texts) and len(texts) == 3):
                raise UserError(f"DATASETS.{key}: expected {form}, got {entry!r}")
            register(*entry)
    for key in ("TRAIN", "TEST"):
        if not _are_texts(cfg.DATASETS[key]):
            raise UserError(f"DATASETS.{key}: expected names, got {cfg.DATASETS[key]!r}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def check_folder(image_root: str) -> None:
    """Make sure that the image folder is there."""
    if not os.path.isdir(image_root):
        raise UserError(f"image folder {image_root!r} not found")
