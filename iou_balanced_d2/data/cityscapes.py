"""Boxes of Cityscapes' 8 thing classes, from its polygons.

    <root>/cityscapes/gtFine/<split>/<city>/<image>_gtFine_polygons.json
    <root>/cityscapes/leftImg8bit/<split>/<city>/<image>_leftImg8bit.png

The rules, those of Cityscapes' own label images where these have one:

* Polygons are drawn in the order of the file at the image's size, later ones over earlier ones, of
  whatever class; an outline belongs to its object. Deleted objects are not drawn, nor are licence
  plates, which belong to their vehicle.
* A box is the bounds of an object's visible pixels, as edges: the box of pixel (0, 0) is 0, 0, 1,
  1. So it is within the image, and reaches over what hides the object's middle.
* Objects of which no pixel is visible are left out, and counted in the JSON's "info".
* ``area`` is the number of visible pixels.
* Groups (``cargroup``, ...) are ``iscrowd`` of their class.
"""

import glob
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .conversion import (
    coco_content,
    map_files,
    read_bytes,
    register_converted,
    source_digest,
    stamp,
)

logger = logging.getLogger(__name__)

CITYSCAPES_CLASSES = (
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

_POLYGONS = "_gtFine_polygons.json"
_IMAGE = "_leftImg8bit.png"
_CODE = source_digest(__file__)
# OpenCV draws with 16 bits before the point; polygons may leave the image.
_MAX_COORDINATE = 2**15 - 1
_MAX_PIXELS = 2**28
_NO_ANNOTATION = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


# Number of the class, XYWH box in pixels, "area" (visible pixels) and "iscrowd" (a group).
Thing = tuple[int, list[float], dict[str, Any]]


@dataclass(frozen=True)
class CityscapesSource:
    """One split."""

    path: str  # the folder of leftImg8bit and gtFine
    split: str  # "train" or "val"
    metadata: ClassVar[dict[str, Any]] = {"thing_classes": list(CITYSCAPES_CLASSES)}

    @property
    def image_root(self) -> str:
        """The folder of the split's cities."""
        return os.path.join(self.path, "leftImg8bit", self.split)

    def fingerprint(self) -> list[Any]:
        """Each annotation's name, size and time of change."""
        root = self._annotation_root()
        return [_CODE, [[name, *stamp(os.path.join(root, name))] for name in self._names()]]

    def convert(self) -> dict[str, Any]:
        """The boxes in COCO's format; "info" has the number of "hidden_objects"."""
        names = self._names()
        files = [self._image_of(name) for name in names]
        paths = [os.path.join(self._annotation_root(), name) for name in names]
        read = map_files(parse_cityscapes_json, paths, title="Cityscapes")
        images = [(file, *scene[:3]) for file, scene in zip(files, read, strict=True)]
        content = coco_content(CITYSCAPES_CLASSES, images)
        content["info"]["hidden_objects"] = hidden = sum(scene[3] for scene in read)
        logger.info(f"Cityscapes {self.split}: left out {hidden} objects that are hidden wholly")
        return content

    def _annotation_root(self) -> str:
        return os.path.join(self.path, "gtFine", self.split)

    def _names(self) -> list[str]:
        """The annotation files, relative to their root: <city>/<image>_gtFine_polygons.json."""
        root = self._annotation_root()
        names = sorted(glob.glob(f"*/*{_POLYGONS}", root_dir=root), key=os.path.split)
        if not names:
            raise UserError(
                f"{root}: not found, or has no <city>/*{_POLYGONS}; set the environment variable "
                "DETECTRON2_DATASETS to the folder that holds cityscapes"
            )
        return names

    def _image_of(self, name: str) -> str:
        """The image of an annotation, relative to the image root; it must be there."""
        image = name.removesuffix(_POLYGONS) + _IMAGE
        path = os.path.join(self.image_root, image)
        if not os.path.isfile(path):
            raise UserError(f"{path}: not found; {name} is the annotation of it")
        return image


def parse_cityscapes_json(path: str) -> tuple[int, int, list[Thing], int]:
    """Width, height and :func:`visible_things` of one ``*_gtFine_polygons.json``."""
    try:
        content = json.loads(read_bytes(path))
        width, height = int(content["imgWidth"]), int(content["imgHeight"])
        objects = [
            (str(o["label"]), np.array(o["polygon"], dtype=np.float64).reshape(-1, 2))
            for o in content["objects"]
            if not o.get("deleted", 0)
        ]
    except _NO_ANNOTATION as error:
        raise UserError(f"{path}: not an annotation of Cityscapes: {error!r}") from error
    if not (width >= 1 and height >= 1 and width * height <= _MAX_PIXELS):
        raise UserError(f"{path}: the image size is {width} x {height}; write the true one")
    for label, polygon in objects:
        if not (np.abs(polygon) <= _MAX_COORDINATE).all():  # NaN is not, either
            raise UserError(f"{path}: a {label!r} has a vertex that is no place in the image")
    return width, height, *visible_things(objects, height=height, width=width)


def visible_things(
    objects: Sequence[tuple[str, NDArray[Any]]], *, height: int, width: int
) -> tuple[list[Thing], int]:
    """Draw polygons (V, 2) of x, y in their order and bound what is seen of each thing.

    Returns the visible objects of the 8 classes, and the number of those that are hidden wholly.
    """
    # The row of the object seen at each pixel; int32 holds more rows than 8 bit do.
    owner = np.full((height, width), -1, dtype=np.int32)
    drawn = [(row, label, np.rint(polygon).astype(np.int32))
             for row, (label, polygon) in enumerate(objects)
             if label != "license plate" and len(polygon)]  # fmt: skip
    for row, _, polygon in drawn:
        cv2.fillPoly(owner, [polygon], row)
    things: list[Thing] = []
    hidden = 0
    for row, label, polygon in drawn:
        name = label.removesuffix("group")
        if name not in CITYSCAPES_CLASSES:
            continue
        # Only the polygon's own bounds are looked through: most objects are small.
        x, y = np.maximum(polygon.min(axis=0), 0)
        x2, y2 = np.maximum(polygon.max(axis=0) + 1, 0)
        seen = (owner[y:y2, x:x2] == row).astype(np.uint8)
        left, top, w, h = cv2.boundingRect(seen) if seen.size else (0, 0, 0, 0)
        if not w:
            hidden += 1
            continue
        fields = {"area": int(seen.sum(dtype=np.int64)), "iscrowd": int(name != label)}
        things.append((CITYSCAPES_CLASSES.index(name), [int(x) + left, int(y) + top, w, h], fields))
    return things, hidden


def register_cityscapes(root: str) -> None:
    """Register ``cityscapes_fine_bbox_train`` and ``_val``, of <root>/cityscapes."""
    for split in ("train", "val"):
        source = CityscapesSource(os.path.join(root, "cityscapes"), split)
        register_converted(f"cityscapes_fine_bbox_{split}", source)
