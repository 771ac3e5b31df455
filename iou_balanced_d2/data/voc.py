"""PASCAL VOC, and data sets of one's own in its layout.

    <folder>/ImageSets/Main/<split>.txt    one image id a line
    <folder>/Annotations/<id>.xml
    <folder>/JPEGImages/<id>.jpg           or another image format

VOC's pixel coordinates start at 1 and include the last pixel: xmin, ymin, xmax, ymax become the
edges x1 - 1, y1 - 1, x2, y2, so that a box over the whole image is 0, 0, width, height. Boxes are
kept as they are annotated, degenerate ones too. ``difficult`` is kept as a field of its own;
``iscrowd`` and ``ignore`` stay 0, as COCO's matching of those differs from VOC's.
"""

import math
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .conversion import (
    NamedObject,
    map_files,
    named_content,
    read_bytes,
    read_text,
    register_converted,
    source_digest,
    stamp,
)
from .formats import hint_for_folder
from .images import IMAGE_SUFFIXES

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
DIFFICULT_POLICIES = ("ignore", "count", "drop")

_SPLITS = {"2007": ("train", "val", "trainval", "test"), "2012": ("train", "val", "trainval")}
_CODE = source_digest(__file__)
# As tools write <difficult>.
_DIFFICULT = {"": 0, "0": 0, "false": 0, "no": 0, "unspecified": 0, "1": 1, "true": 1, "yes": 1}
_COLUMN = re.compile(r"\s+(-1|0|1)$")  # of a list of one class
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*encoding=["']([\w.-]+)["'][^>]*\?>""")


@dataclass(frozen=True)
class VocSource:
    """Images of one or several VOC folders."""

    path: str  # the folder that the parts, and the images' file names, are relative to
    # (folder, split) each; "" for all images that have an annotation.
    parts: tuple[tuple[str, str], ...]
    # The classes in their order; None for the sorted names found in all annotations of the folders,
    # whatever the split, so that all splits agree.
    classes: tuple[str, ...] | None

    @property
    def image_root(self) -> str:
        """The folder of the parts."""
        return self.path

    @property
    def metadata(self) -> dict[str, Any]:
        """``voc_style`` asks the evaluator for VOC's AP as well."""
        classes = {} if self.classes is None else {"thing_classes": list(self.classes)}
        return {"voc_style": True, **classes}

    def fingerprint(self) -> list[Any]:
        """The images of the split in order, and each annotation's size and time of change."""
        files = [[xml, *stamp(os.path.join(self.path, xml))] for xml in self._annotations()]
        return [_CODE, self.classes, self._entries(), files]

    def convert(self) -> dict[str, Any]:
        """The annotations in COCO's format, with ``difficult``."""
        xmls = self._annotations()
        paths = [os.path.join(self.path, xml) for xml in xmls]
        read = map_files(lambda path: parse_voc_xml(path, read_bytes(path)), paths, title="VOC")
        classes = self.classes or sorted({o[0] for scene in read for o in scene[2]})
        if not classes:
            raise UserError(f"{self.path}: no object in any annotation")
        scenes = dict(zip(xmls, read, strict=True))
        return named_content([(image, *scenes[xml]) for xml, image in self._entries()], classes)

    def _entries(self) -> list[tuple[str, str]]:
        """(annotation, image) of each image of the splits, relative to the folder."""
        return [entry for part in self.parts for entry in _list_split(self.path, *part)]

    def _annotations(self) -> list[str]:
        """The annotations to be read: the splits', or all where these give the classes."""
        listed = [xml for xml, _ in self._entries()]
        if self.classes is not None:
            return listed
        for part, _ in self.parts:
            names = _list_folder(os.path.join(self.path, part, "Annotations"))
            xmls = [name for name in names if name.endswith(".xml")]
            listed += [os.path.join(part, "Annotations", name) for name in xmls]
        return list(dict.fromkeys(listed))


def _list_folder(path: str) -> list[str]:
    try:
        # ("._photo.jpg" is what macOS leaves beside "photo.jpg" on foreign disks.)
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        hint = hint_for_folder(os.path.dirname(path)) or (
            " (VOC itself is looked for in $DETECTRON2_DATASETS)"
        )
        raise UserError(
            f"{path}: not found; VOC's layout is Annotations, ImageSets/Main and JPEGImages{hint}"
        ) from error


def _list_split(root: str, folder: str, split: str) -> list[tuple[str, str]]:
    """(annotation, image) of each image of a split, relative to ``root``."""
    path = os.path.join(root, folder, "ImageSets", "Main", f"{split}.txt")
    images_of: dict[str, list[str]] = {}
    for name in _list_folder(os.path.join(root, folder, "JPEGImages")):
        if Path(name).suffix.lower() in IMAGE_SUFFIXES:
            images_of.setdefault(Path(name).stem, []).append(name)
    if split:
        lines = list(filter(None, map(str.strip, read_text(path).splitlines())))
        ids = [_image_id(line, images_of) for line in lines]
    else:
        path = os.path.join(root, folder, "Annotations")
        stems = [name.removesuffix(".xml") for name in _list_folder(path) if name.endswith(".xml")]
        ids = lines = [stem for stem in stems if stem in images_of]
    if not ids:
        raise UserError(f"{path}: lists no image")
    twice = [i for i, n in Counter(ids).items() if n > 1]
    missing = [i for i in ids if i not in images_of]
    for names, what in ((twice, " twice"), (missing, ", of which JPEGImages has no image")):
        if names:
            number = f" ({len(names)} such of {len(ids)})" if len(names) > 1 else ""
            raise UserError(f"{path}: lists {names[0]!r}{what}{number}")
    xmls = [os.path.join(folder, "Annotations", f"{i}.xml") for i in ids]
    return [
        (xml, os.path.join(folder, "JPEGImages", _choose(images_of[i], line, f"{root}/{xml}")))
        for i, line, xml in zip(ids, lines, xmls, strict=True)
    ]


def _image_id(line: str, images_of: dict[str, list[str]]) -> str:
    """The id that a line means, which may have a folder, an ending, or VOC's column -1, 0, 1."""
    for text in (line, _COLUMN.sub("", line)):
        name = _file_name(text)
        for id_ in (text, name, Path(name).stem):
            if id_ in images_of:
                return id_
    return line


def _choose(images: list[str], line: str, xml: str) -> str:
    """Of images of one id the one that the list names, or else the annotation."""
    if len(images) == 1:  # nearly always; no annotation is read for it
        return images[0]
    stated = parse_xml(xml, read_bytes(xml)).findtext("filename") or ""
    names = map(_file_name, (line, _COLUMN.sub("", line), stated.strip()))
    return next((name for name in names if name in images), images[-1])


def _file_name(path: str) -> str:
    return Path(path.replace("\\", "/")).name


def parse_voc_xml(path: str, content: bytes) -> tuple[int, int, list[NamedObject]]:
    """The image's width, height and objects, with "difficult" (0 or 1) and "ignore" (0)."""
    root = parse_xml(path, content)
    width, height = (_number(root, f"size/{side}", path) for side in ("width", "height"))
    if width < 1 or height < 1:
        raise UserError(f"{path}: the image size is {width} x {height}; write the true one")
    return int(width), int(height), [_object(o, path) for o in root.findall("object")]


def parse_xml(path: str, content: bytes) -> ET.Element:
    """The root element; also of encodings that Python knows and its XML parser does not."""
    try:
        try:
            return ET.fromstring(content)
        except (LookupError, ValueError):  # an encoding; ParseError is no ValueError
            head = _DECLARATION.match(content)
            if head is None:
                raise
            text = content[head.end() :].decode(head[1].decode("ascii"))
            return ET.fromstring(text)
    except (ET.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{path}: not an XML file: {error}") from error


def _object(element: ET.Element, path: str) -> NamedObject:
    """Class, XYWH box and difficult of an <object>; its <part>s are not objects of the set."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{path}: an object has no <name>")
    box = [_number(element, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax")]
    difficult = (element.findtext("difficult") or "").strip()
    if difficult.lower() not in _DIFFICULT:
        raise UserError(f"{path}: <difficult> must be 0 or 1, got {difficult!r}")
    return name, _xywh(box), {"ignore": 0, "difficult": _DIFFICULT[difficult.lower()]}


def _number(element: ET.Element, tag: str, path: str) -> float:
    """A finite number, as an int where it is one."""
    text = element.findtext(tag)
    if text is None:
        raise UserError(f"{path}: no <{tag}> in <{element.tag}>")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}: <{tag}> must be a number, got {text!r}")
    return int(value) if value.is_integer() else value


def _xywh(corners: list[float]) -> list[float]:
    """From 1-based pixels, the last one included, to a box of edges.

    Corners that coincide are a slip of the annotator, not an object of one pixel, and stay without
    extent.
    """
    x1, y1, x2, y2 = corners
    last = 0 if (x1, y1) == (x2, y2) else 1
    return [x1 - 1, y1 - 1, x2 - x1 + last, y2 - y1 + last]


def check_difficult_policy(policy: str) -> None:
    """Check DATASETS.VOC_DIFFICULT.

    Raises:
        UserError: if it is none of :data:`DIFFICULT_POLICIES`.
    """
    if policy not in DIFFICULT_POLICIES:
        allowed = ", ".join(map(repr, DIFFICULT_POLICIES))
        raise UserError(f"DATASETS.VOC_DIFFICULT must be one of {allowed}, got {policy!r}")


def training_dicts(dicts: list[dict[str, Any]], policy: str) -> list[dict[str, Any]]:
    """Carry out DATASETS.VOC_DIFFICULT in training: all but "count" leave difficult objects out.

    What is left out is background to the losses. An image that has no other object stays, without
    annotations: DATALOADER.FILTER_EMPTY_ANNOTATIONS has to be carried out after this.

    Args:
        dicts: detectron2's dataset dicts; annotations without "difficult" are kept.
        policy: "ignore", "count" or "drop".

    Returns:
        new dicts; those given, which the DatasetCatalog's user may share, are not changed.

    Raises:
        UserError: if the policy is unknown.
    """
    check_difficult_policy(policy)
    if policy == "count":
        return list(dicts)
    return [
        {**d, "annotations": [a for a in d["annotations"] if not a.get("difficult", 0)]}
        if "annotations" in d
        else d
        for d in dicts
    ]


def register_voc_folder(
    name: str, folder: str, split: str, class_names: Sequence[str] | None = None
) -> None:
    """Register a folder of VOC's layout under ``name``, for DATASETS.TRAIN and DATASETS.TEST.

    Nothing is read before the data set is used. Registering the same set again does nothing.

    Args:
        name: the data set's name in the config.
        folder: holds Annotations, ImageSets/Main and JPEGImages.
        split: name of a file in ImageSets/Main, without ".txt".
        class_names: the classes in their order; None for the sorted names found in all of the
            folder's annotations.

    Raises:
        UserError: if the name is taken by another data set, or the class names are no such list.
    """
    classes = None if class_names is None else tuple(class_names)
    if classes is not None and (not classes or len(set(classes)) < len(classes)):
        raise UserError(f"DATASETS.VOC_FOLDER: {name!r} needs class names, each once: {classes}")
    source = VocSource(folder, (("", split),), classes)
    register_converted(name, source, key="DATASETS.VOC_FOLDER")


def register_voc(root: str) -> None:
    """Register VOC 2007, VOC 2012 and the union of their trainval, each as ``..._coco``."""
    sets = {
        f"voc_{year}_{split}_coco": ((f"VOC{year}", split),)
        for year, splits in _SPLITS.items()
        for split in splits
    }
    union = (("VOC2007", "trainval"), ("VOC2012", "trainval"))
    for name, parts in {**sets, "voc_0712_trainval_coco": union}.items():
        register_converted(name, VocSource(root, parts, VOC_CLASSES))
