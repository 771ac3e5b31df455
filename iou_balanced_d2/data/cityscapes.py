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

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .conversion import map_files, register_converted, source_digest, stamp

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


@dataclass(frozen=True)
class CityscapesBox:
    """One visible object.

    Attributes:
        label: index into :data:`CITYSCAPES_CLASSES`.
        is_group: whether it stands for several objects.
        box: XYXY pixel edges.
        area: number of visible pixels.
    """

    label: int
    is_group: bool
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class CityscapesScene:
    """One annotated image.

    Attributes:
        width: in pixels.
        height: in pixels.
        boxes: the visible objects of the 8 classes, in the order of the file.
        hidden: number of objects of the 8 classes of which nothing is visible.
    """

    width: int
    height: int
    boxes: list[CityscapesBox]
    hidden: int


@dataclass(frozen=True)
class CityscapesSource:
    """One split.

    Attributes:
        folder: holds leftImg8bit and gtFine.
        split: "train" or "val".
    """

    folder: str
    split: str

    @property
    def path(self) -> str:
        """The data set's folder."""
        return self.folder

    @property
    def image_root(self) -> str:
        """The folder of the split's cities."""
        return os.path.join(self.folder, "leftImg8bit", self.split)

    @property
    def metadata(self) -> dict[str, Any]:
        """The 8 classes."""
        return {"thing_classes": list(CITYSCAPES_CLASSES)}

    def fingerprint(self) -> list[Any]:
        """Each annotation's name, size and time of change."""
        root = self._annotation_root()
        return [_CODE, [[name, *stamp(os.path.join(root, name))] for name in self._names()]]

    def convert(self) -> dict[str, Any]:
        """The boxes in COCO's format; images are numbered from 1."""
        names = self._names()
        content: dict[str, Any] = {
            "info": {"hidden_objects": 0},
            "images": [],
            "annotations": [],
            "categories": [
                {"id": i, "name": name} for i, name in enumerate(CITYSCAPES_CLASSES, start=1)
            ],
        }
        images = [self._image_of(name) for name in names]
        paths = [os.path.join(self._annotation_root(), name) for name in names]
        scenes = map_files(parse_cityscapes_json, paths, title="Cityscapes")
        for image, scene in zip(images, scenes, strict=True):
            _add_image(content, image, scene)
        hidden = content["info"]["hidden_objects"]
        logger.info(f"Cityscapes {self.split}: left out {hidden} objects that are hidden wholly")
        return content

    def _annotation_root(self) -> str:
        return os.path.join(self.folder, "gtFine", self.split)

    def _names(self) -> list[str]:
        """The annotation files, relative to their root: <city>/<image>_gtFine_polygons.json."""
        root = self._annotation_root()
        try:
            with os.scandir(root) as entries:
                cities = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            raise UserError(
                f"{root}: not found; set the environment variable DETECTRON2_DATASETS to the "
                "folder that holds cityscapes"
            ) from error
        names = [
            os.path.join(city, name)
            for city in cities
            for name in sorted(os.listdir(os.path.join(root, city)))
            if name.endswith(_POLYGONS)
        ]
        if not names:
            raise UserError(f"{root}: has no <city>/*{_POLYGONS}")
        return names

    def _image_of(self, name: str) -> str:
        """The image of an annotation, relative to the image root; it must be there."""
        image = name.removesuffix(_POLYGONS) + _IMAGE
        path = os.path.join(self.image_root, image)
        if not os.path.isfile(path):
            raise UserError(f"{path}: not found; {name} is the annotation of it")
        return image


def parse_cityscapes_json(path: str, text: bytes) -> CityscapesScene:
    """Parse one ``*_gtFine_polygons.json``.

    Args:
        path: named in errors.
        text: JSON.

    Returns:
        the image's size and its visible objects.

    Raises:
        UserError: if it is broken or not of this format.
    """
    try:
        content = json.loads(text)
        width, height = int(content["imgWidth"]), int(content["imgHeight"])
        objects = [
            (str(o["label"]), np.array(o["polygon"], dtype=np.float64).reshape(-1, 2))
            for o in content["objects"]
            if not o.get("deleted", 0)
        ]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(f"{path}: not an annotation of Cityscapes: {error!r}") from error
    if not (width >= 1 and height >= 1 and width * height <= _MAX_PIXELS):
        raise UserError(f"{path}: the image size is {width} x {height}; write the true one")
    for label, polygon in objects:
        if not (np.abs(polygon) <= _MAX_COORDINATE).all():  # NaN is not, either
            raise UserError(f"{path}: a {label!r} has a vertex that is no place in the image")
    return visible_boxes(objects, height=height, width=width)


def visible_boxes(
    objects: Sequence[tuple[str, NDArray[Any]]], *, height: int, width: int
) -> CityscapesScene:
    """Draw polygons over each other and bound what is seen of each thing.

    Args:
        objects: label and (V, 2) vertices x, y in pixels, in drawing order.
        height: of the image.
        width: of the image.

    Returns:
        the visible objects of the 8 classes.
    """
    # The row of the object seen at each pixel; int32 holds more rows than 8 bit do.
    owner = np.full((height, width), -1, dtype=np.int32)
    drawn = [(row, label, np.rint(polygon).astype(np.int32))
             for row, (label, polygon) in enumerate(objects)
             if label != "license plate" and len(polygon)]  # fmt: skip
    for row, _, polygon in drawn:
        cv2.fillPoly(owner, [polygon], row)
    boxes, hidden = [], 0
    for row, label, polygon in drawn:
        name = label.removesuffix("group")
        if name not in CITYSCAPES_CLASSES:
            continue
        bounds = _visible_bounds(owner, row, polygon)
        if bounds is None:
            hidden += 1
            continue
        boxes.append(CityscapesBox(CITYSCAPES_CLASSES.index(name), name != label, *bounds))
    return CityscapesScene(width, height, boxes, hidden)


def _visible_bounds(
    owner: NDArray[np.int32], row: int, polygon: NDArray[np.int32]
) -> tuple[tuple[int, int, int, int], int] | None:
    """XYXY pixel edges and number of the pixels of ``row``; None if there are none.

    Only the polygon's own bounds are looked through: most objects are small.
    """
    x1, y1 = np.maximum(polygon.min(axis=0), 0)
    x2, y2 = np.maximum(polygon.max(axis=0) + 1, 0)
    seen = owner[y1:y2, x1:x2] == row
    columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    if not len(columns):
        return None
    box = (
        int(x1 + columns[0]),
        int(y1 + rows[0]),
        int(x1 + columns[-1]) + 1,
        int(y1 + rows[-1]) + 1,
    )
    return box, int(np.count_nonzero(seen))


def _add_image(content: dict[str, Any], file_name: str, scene: CityscapesScene) -> None:
    """Append an image and its objects to COCO content."""
    image_id = len(content["images"]) + 1
    content["images"].append(
        {"id": image_id, "file_name": file_name, "width": scene.width, "height": scene.height}
    )
    content["info"]["hidden_objects"] += scene.hidden
    for thing in scene.boxes:
        x1, y1, x2, y2 = thing.box
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": thing.label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": thing.area,
                "iscrowd": int(thing.is_group),
            }
        )


def register_cityscapes(root: str) -> None:
    """Register ``cityscapes_fine_bbox_train`` and ``cityscapes_fine_bbox_val``.

    Args:
        root: holds the folder cityscapes.
    """
    for split in ("train", "val"):
        source = CityscapesSource(os.path.join(root, "cityscapes"), split)
        register_converted(f"cityscapes_fine_bbox_{split}", source)
