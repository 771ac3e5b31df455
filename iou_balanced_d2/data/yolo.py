"""Data sets of YOLO's layout, as Ultralytics and Roboflow write it.

    data.yaml             names of the classes, and the images of each split: a folder, a list of
                          folders, or a text file that lists images; relative to ``path``
    .../images/<id>.jpg   an image
    .../labels/<id>.txt   its objects, one a line; no file, or an empty one: no objects

A line is a class index and a box, or a polygon, whose bounds are taken; in shares of the image's
size, which is that after the turn its EXIF data ask for. With ``kpt_shape`` in the data.yaml the
keypoints of a box follow it, and are left out.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import yaml
from PIL import Image

from ..errors import UserError
from ..files import read_yaml
from . import coco_format, images
from .coco_format import clean_coco
from .conversion import (
    coco_content,
    map_files,
    read_text,
    register_converted,
    source_digest,
    stamp,
)
from .formats import hint_for_folder
from .images import IMAGE_SUFFIXES, shown_size

_CODE = source_digest(__file__, images.__file__, coco_format.__file__)
# A share may be this far outside of 0 to 1 by rounding; clipped.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class YoloSource:
    """One split of a data.yaml."""

    path: str  # of the data.yaml
    split: str  # "train", "val" or "test"
    metadata: ClassVar[dict[str, Any]] = {}  # nothing is known before the file is read

    @property
    def image_root(self) -> str:
        """The folder of the data.yaml."""
        return os.path.dirname(os.path.abspath(self.path))

    def fingerprint(self) -> list[Any]:
        """The list of images, and size and time of change of each and of its label file."""
        images = self._images()
        files = filter(os.path.exists, [*images, *map(label_file, images)])
        return [_CODE, *stamp(self.path), images, [[file, *stamp(file)] for file in files]]

    def convert(self) -> dict[str, Any]:
        """The boxes in COCO's format, clean: without those that are not finite."""
        data = read_data_yaml(self.path)
        names = class_names_of(data, self.path)
        read_image = partial(_read_image, len(names), _keypoint_numbers(data, self.path))
        images = self._images()
        read = map_files(read_image, images, title="YOLO")
        files = [os.path.relpath(image, self.image_root) for image in images]
        scenes = [(file, *x) for file, x in zip(files, read, strict=True)]
        return clean_coco(coco_content(names, scenes))

    def without_labels(self) -> str:
        """The first label file that was looked for if the split has none, else an empty text."""
        files = [label_file(image) for image in self._images()]
        return "" if any(map(os.path.exists, files)) else files[0]

    def _images(self) -> list[str]:
        return images_of(read_data_yaml(self.path), self.path, self.split)


def register_yolo_folder(name: str, path: str, split: str) -> None:
    """Register a data set of YOLO's layout under ``name``, for DATASETS.TRAIN and DATASETS.TEST.

    Nothing is read before the data set is used. Registering the same set again does nothing.

    Args:
        name: the data set's name in the config.
        path: the data.yaml, or the folder that holds it.
        split: a key of it: "train", "val" or "test".

    Raises:
        UserError: if the name is taken by another data set.
    """
    file = os.path.join(path, "data.yaml") if os.path.isdir(path) else path
    register_converted(name, YoloSource(file, split), key="DATASETS.YOLO_FOLDER")


def read_data_yaml(path: str) -> dict[str, Any]:
    """The content of a data.yaml."""
    try:
        content = read_yaml(path)
    except OSError as error:
        hint = hint_for_folder(path if os.path.isdir(path) else os.path.dirname(path))
        raise UserError(f"{path}: can't be read: {error.strerror}{hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not YOLO's data.yaml: it has no keys")
    return content


def class_names_of(content: dict[str, Any], path: str) -> list[str]:
    """The classes in their order: ``names``, a list or a mapping of 0, 1, ... to names."""
    names = content.get("names")
    if isinstance(names, dict):
        numbers = {str(key): name for key, name in names.items()}
        names = [numbers.get(str(i)) for i in range(len(numbers))]
    if not (isinstance(names, list) and names and None not in names):
        raise UserError(f"{path}: names must be a list of class names, or 0: name, 1: name, ...")
    if odd := [name for name in names if type(name) not in (str, int)]:  # a bool is an int, too
        raise UserError(f"{path}: names has {odd[0]!r}, which is no text: put the name in quotes")
    if content.get("nc", len(names)) != len(names):
        raise UserError(f"{path}: nc is {content['nc']!r}, but names has {len(names)} classes")
    return [str(name) for name in names]


def _keypoint_numbers(content: dict[str, Any], path: str) -> int:
    """How many numbers of keypoints follow each box, by ``kpt_shape``."""
    shape = content.get("kpt_shape", [0, 0])
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape)):
        raise UserError(f"{path}: kpt_shape must be two whole numbers, such as [17, 3]")
    return shape[0] * shape[1]


def images_of(content: dict[str, Any], path: str, split: str) -> list[str]:
    """The paths of a split's images, sorted; Roboflow's folder "valid" is "val"."""
    places = content.get(split)
    if not places:
        splits = [key for key in ("train", "val", "test") if content.get(key)]
        raise UserError(f"{path}: has no split {split!r}; it has {', '.join(splits) or 'none'}")
    if not isinstance(places, str | list):
        raise UserError(f"{path}: {split} must be a folder or several, got {places!r}")
    images: set[str] = set()
    for place in [places] if isinstance(places, str) else places:
        images.update(_list_place(_resolve(str(place), content, path)))
    if not images:
        raise UserError(f"{path}: split {split!r} has no image in {places!r}")
    return sorted(images)


def _resolve(place: str, content: dict[str, Any], path: str) -> Path:
    """Where a split's images are; relative to ``path`` of the file, or to the file itself."""
    here = Path(path).absolute().parent
    roots = [here / str(content["path"]), here] if content.get("path") else [here]
    # Roboflow writes "../train/images" for the folder "train" beside the file.
    candidates = [root / p for root in roots for p in (place, place.removeprefix("../"))]
    for candidate in candidates:
        if candidate.exists():
            return Path(os.path.normpath(candidate))
    raise UserError(f"{path}: {place!r} not found, looked for {candidates[0]}")


def _list_place(place: Path) -> list[str]:
    if place.is_file():  # a list of images, relative to itself
        lines = read_text(str(place)).splitlines()
        return [os.path.normpath(place.parent / line.strip()) for line in lines if line.strip()]
    return [
        str(file)
        for file in place.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
    ]


def label_file(image: str) -> str:
    """The label file of an image: "labels" for the last folder "images", and the ending .txt."""
    folder, name = os.path.split(os.path.splitext(image)[0])
    parts = folder.split(os.sep)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return os.path.join(os.sep.join(parts), f"{name}.txt")


def _read_image(
    num_classes: int, num_keypoint_numbers: int, image: str
) -> tuple[int, int, list[tuple[int, list[float], dict[str, Any]]]]:
    """An image's width, height and objects, as in an AnnotatedImage."""
    try:
        with Image.open(image) as file:
            width, height = shown_size(file)
    except Exception as error:  # PIL raises SyntaxError and others on broken files
        raise UserError(f"{image}: can't be read: {' '.join(str(error).split())}") from error
    path = label_file(image)
    if not os.path.exists(path):
        return width, height, []
    objects: list[tuple[int, list[float], dict[str, Any]]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            label, (x1, y1, x2, y2) = _parse_line(line, where, num_classes, num_keypoint_numbers)
            box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
            objects.append((label, box, {}))
    return width, height, objects


def _parse_line(
    line: str, where: str, num_classes: int, num_keypoint_numbers: int
) -> tuple[int, list[float]]:
    """Class index and XYXY box in shares of the image."""
    try:
        label, *numbers = map(float, line.split())
    except ValueError as error:
        raise UserError(f"{where}: must be numbers, got {line.strip()[:60]!r}") from error
    if not (label.is_integer() and 0 <= label < num_classes):
        raise UserError(f"{where}: the class must be 0 to {num_classes - 1}, got {label:g}")
    if num_keypoint_numbers and len(numbers) == 4 + num_keypoint_numbers:
        numbers = numbers[:4]
    if len(numbers) == 5:
        raise UserError(f"{where}: 6 numbers, as predictions have; labels have 5")
    if len(numbers) == 4:
        x, y, w, h = numbers
        edges = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        shares = [x, y, abs(w), abs(h)]  # the box may stick out
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:  # a polygon
        xs, ys = numbers[::2], numbers[1::2]
        edges = shares = [min(xs), min(ys), max(xs), max(ys)]
    else:
        raise UserError(f"{where}: must be a class and a box or polygon, got {line.strip()[:60]!r}")
    if not all(-_TOLERANCE <= v <= 1 + _TOLERANCE for v in shares if not math.isnan(v)):
        raise UserError(f"{where}: boxes are in shares of the image, 0 to 1, got {line.strip()!r}")
    return int(label), [v if math.isnan(v) else min(max(v, 0.0), 1.0) for v in edges]
