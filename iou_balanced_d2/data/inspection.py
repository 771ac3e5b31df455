"""Problems of a data set."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import META_ARCH_REGISTRY
from numpy.typing import NDArray
from PIL import Image

from ..modeling import interface_of
from .conversion import map_files
from .images import fault_of, is_turned, shown_size

# What a problem is called -> what it means. The first ones leave a box out of training.
PROBLEMS = {
    "no area": "box without width or height; left out of training",
    "outside": "box with no part inside the image; left out of training",
    "unknown image": "image_id that is not among the images; left out",
    "not finite": "box of which a number is NaN, infinite or too large; left out",
    "sticks out": "box partly outside the image; the part inside is used",
    "unknown category": "category_id that is not among the categories",
    "class twice": "two categories of one name; give each a name of its own",
    "file twice": "two images of one file; merge them under one id",
    "corners": "boxes that are right as x1, y1, x2, y2 and wrong as COCO's x, y, width, height",
    "normalised": "boxes from 0 to 1, where COCO's are in pixels",
    "only crowds": "every object is a crowd (iscrowd 1), so there is nothing to train on",
    "missing image": "image file that is not there",
    "unreadable image": "image file that can't be decoded to its end",
    "size mismatch": "image file of another size than annotated",
    "not 8 bit": "image of 16 bit or of floating point, which is read as nearly black or white; "
    "convert it to 8 bit",
    "turned TIFF": "TIFF file with an EXIF orientation, which is turned twice; save it turned",
    "strip": "image so long and narrow that nothing is left of it when resized to the config's "
    "sizes; cut it into pieces",
}
# Those that make a training useless or impossible; the others leave out a box, or nothing.
FATAL = frozenset(PROBLEMS) - {
    "no area", "outside", "unknown image", "not finite", "sticks out",
}  # fmt: skip
_TOLERANCE = 0.5  # pixels; annotation tools round to whole ones
# Fewer boxes don't show another convention.
_FEWEST_BOXES = 5
_MANY_TOO_FAR = 0.1  # of the boxes
_LARGER_THAN_1 = 8  # pixels


@dataclass
class Report:
    """What was found in one data set."""

    num_images: int  #: number of images
    num_annotations: int  #: number of annotations
    num_empty: int  #: number of images without annotations
    classes: dict[str, int]  #: number of annotations of each class
    #: Name of the problem -> where, each ``file, annotation id: what``.
    problems: dict[str, list[str]] = field(default_factory=dict)
    #: Kind of :data:`REPAIRS` -> number and first place.
    repairs: dict[str, list[Any]] = field(default_factory=dict)
    rotated: int = 0  #: number of images that their EXIF data turn by 90 degrees

    def add(self, problems: Iterable[tuple[str, str]]) -> None:
        """Add (name of the problem, where) pairs."""
        for name, where in problems:
            self.problems.setdefault(name, []).append(where)


def inspect_annotations(content: dict[str, Any]) -> Report:
    """The cheap part: everything that the annotations alone show.

    Args:
        content: clean, see :func:`read_coco_json`.

    Returns:
        the report; reading the images is :func:`inspect_images`.
    """
    images = {image["id"]: image for image in content["images"]}
    annotations = content["annotations"]
    histogram = Counter(a["category_id"] for a in annotations)
    report = Report(
        num_images=len(images),
        num_annotations=len(annotations),
        num_empty=len(images.keys() - {a["image_id"] for a in annotations}),
        classes={c["name"]: histogram.get(c["id"], 0) for c in content["categories"]},
        problems={kind: list(places) for kind, places in content["info"]["problems"].items()},
        repairs=content["info"]["repairs"],
    )
    report.add(_twice("class twice", [c["name"] for c in content["categories"]]))
    report.add(_twice("file twice", [image["file_name"] for image in content["images"]]))
    report.add(_box_problems(annotations, images))
    if annotations and all(a["iscrowd"] for a in annotations):
        report.add([("only crowds", f"{len(annotations)} objects")])
    return report


def inspect(cfg: CfgNode, content: dict[str, Any], image_root: str, *, read_images: bool) -> Report:
    """All that is wrong with a data set.

    Args:
        cfg: the full config.
        content: clean, see :func:`read_coco_json`.
        image_root: folder of the images.
        read_images: decode them, too; else they only have to be there.

    Returns:
        the report.
    """
    report = inspect_annotations(content)
    if read_images:
        images = inspect_images(content, image_root)
        report.problems.update(images.problems)
        report.rotated = images.rotated
    else:
        report.add(("missing image", path) for path in missing_images(content, image_root))
    report.add(("strip", place) for place in strips(cfg, content))
    return report


def trained_on(content: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    """The annotations that a training keeps: no crowds, with an area inside of their image.

    Args:
        content: clean, see :func:`read_coco_json`.
        policy: DATASETS.VOC_DIFFICULT; only by "count" difficult objects are trained on.
    """
    rows = [
        a
        for a in content["annotations"]
        if not a["iscrowd"] and (policy == "count" or not a.get("difficult"))
    ]
    sides = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    box = np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4)
    size = np.array([sides[a["image_id"]] for a in rows]).reshape(-1, 2)
    inside = np.minimum(box[:, :2] + box[:, 2:], size) > box[:, :2].clip(min=0)
    return [a for a, is_good in zip(rows, inside.all(axis=1), strict=True) if is_good]


def strips(cfg: CfgNode, content: dict[str, Any]) -> list[str]:
    """The images of which detectron2's resizing leaves less than a pixel.

    Args:
        cfg: the full config.
        content: clean, see :func:`read_coco_json`.

    Returns:
        a text of each.
    """
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if interface_of(detector).build_augmentation(cfg, False) is not None:
        return []  # images are resized to a square or so
    sizes = [(size, cfg.INPUT.MAX_SIZE_TRAIN) for size in cfg.INPUT.MIN_SIZE_TRAIN]
    sizes.append((cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))
    limit = min(longest for _, longest in sizes)  # no side gets under half a pixel below it
    found = []
    for image in content["images"]:
        sides = (image["height"], image["width"])
        if max(sides) >= limit * min(sides) and any(
            min(ResizeShortestEdge.get_output_shape(*sides, *size)) < 1 for size in sizes if size[0]
        ):
            found.append(f"{image['file_name']}: {image['width']}x{image['height']}")
    return found


def _twice(kind: str, names: list[str]) -> list[tuple[str, str]]:
    return [(kind, f"{name!r}, {n} times") for name, n in Counter(names).items() if n > 1]


def _box_problems(
    annotations: list[dict[str, Any]], images: dict[int, dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Boxes that are wrong each by itself, or all of them as of another convention."""
    if not annotations:
        return
    sizes = [
        (image["width"], image["height"]) for image in (images[a["image_id"]] for a in annotations)
    ]
    bad = _bad_boxes(np.array([a["bbox"] for a in annotations], dtype=np.float64), np.array(sizes))
    for kind, mask in bad.items():
        for i in np.flatnonzero(mask):
            annotation = annotations[i]
            name = images[annotation["image_id"]]["file_name"]
            yield kind, f"{name!r}, annotation {annotation['id']!r}: box {annotation['bbox']}"


def _bad_boxes(boxes: NDArray[Any], size: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """The boxes that have each kind of problem; a box has one at most.

    Args:
        boxes: (M, 4) float64 XYWH pixels.
        size: (M, 2), width and height of each box's image.
    """
    near, extent, far = boxes[:, :2], boxes[:, 2:], boxes[:, :2] + boxes[:, 2:]
    first = np.arange(len(boxes)) == 0
    if len(boxes) >= _FEWEST_BOXES:
        if (np.abs(boxes) <= 1).all() and (size > _LARGER_THAN_1).all():
            return {"normalised": first}
        limit = size + _TOLERANCE
        # For corners "extent" is the far corner.
        are_corners = ((extent > near) & (extent <= limit) & (near >= -_TOLERANCE)).all()
        if are_corners and (far > limit).any(axis=1).mean() > _MANY_TOO_FAR:
            return {"corners": first}
    no_area = ~(extent > 0).all(axis=1)
    outside = ~no_area & ((near >= size) | (far <= 0)).any(axis=1)
    sticks_out = ((near < -_TOLERANCE) | (far > size + _TOLERANCE)).any(axis=1)
    return {
        "no area": no_area, "outside": outside, "sticks out": sticks_out & ~no_area & ~outside,
    }  # fmt: skip


def missing_images(content: dict[str, Any], image_root: str) -> list[str]:
    """The images that are not there; each folder is listed once, no file is opened.

    Args:
        content: clean, see :func:`read_coco_json`.
        image_root: folder of the images.

    Returns:
        their paths.
    """
    names_of: dict[str, set[str]] = {}
    missing = []
    for image in content["images"]:
        folder, name = os.path.split(os.path.join(image_root, image["file_name"]))
        if folder not in names_of:
            with contextlib.suppress(OSError):
                names_of[folder] = set(os.listdir(folder))
        if name not in names_of.setdefault(folder, set()):
            missing.append(os.path.join(folder, name))
    return missing


def inspect_images(content: dict[str, Any], image_root: str) -> Report:
    """The full part: decode every image; a report with the images' problems only.

    Args:
        content: clean, see :func:`read_coco_json`.
        image_root: folder of the images.
    """
    report = Report(len(content["images"]), 0, 0, {})
    look = partial(_look_at, image_root=image_root)
    for problems, is_rotated in map_files(look, content["images"], title="images", many=0):
        report.add(problems)
        report.rotated += is_rotated
    return report


def _look_at(image: dict[str, Any], image_root: str) -> tuple[list[tuple[str, str]], bool]:
    """An image's problems, and whether its EXIF data turn it by 90 degrees."""
    path = os.path.join(image_root, image["file_name"])
    if not os.path.isfile(path):
        return [("missing image", path)], False
    try:
        with Image.open(path) as file:
            (width, height), is_rotated = shown_size(file), is_turned(file)
            fault, mode = fault_of(file), file.mode
            file.load()
    except Exception as error:  # PIL raises SyntaxError and others on broken files
        return [("unreadable image", f"{path}: {' '.join(str(error).split())}")], False
    problems = []
    if (width, height) != (image["width"], image["height"]):
        turned = ", once turned as its EXIF data say" if is_rotated else ""
        annotated = f"{image['width']}x{image['height']}"
        problems.append(
            ("size mismatch", f"{path}: {width}x{height}{turned}, annotated {annotated}")
        )
    if fault:
        problems.append((fault, f"{path}: mode {mode}" if fault == "not 8 bit" else path))
    return problems, is_rotated
