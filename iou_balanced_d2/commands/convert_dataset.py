"""Convert annotations of other tools into COCO JSON, for DATASETS.COCO_JSON.

python tools/convert_dataset.py cvat annotations.xml train.json --images photos
"""

import argparse
import csv
import json
import math
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.coco_format import clean_coco, load_json
from ..data.conversion import NamedObject, named_content
from ..data.images import shown_size
from ..data.inspection import missing_images
from ..data.voc import IMAGE_SUFFIXES, parse_voc_xml, parse_xml
from ..errors import UserError
from ..files import write_text


class Set:
    """Images with their boxes, from whichever format, and what was no box."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.images: list[tuple[str, int, int, list[NamedObject]]] = []
        self.left_out = 0
        self._folder = args.images

    def add(self, name: str, size: tuple[int, int] | None, boxes: Any, left_out: int = 0) -> None:
        """Add an image and globox's boxes; without a size it is read from the image."""
        objects: list[NamedObject] = [(box.label, list(box.ltwh), {}) for box in boxes]
        self.images.append((name, *(size or size_of(self._folder / name)), objects))
        self.left_out += left_out


def size_of(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return shown_size(image)
    except Exception as error:  # PIL raises SyntaxError and others on broken files
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: can't be read: {reason} (--images names the folder)") from error


def import_globox() -> Any:
    try:
        import globox
    except ImportError as error:
        raise UserError("this format is read by globox: pip install globox") from error
    return globox


def read(what: str, parse: Any, *args: Any, **kwargs: Any) -> Any:
    """Call one of globox's parsers, whose errors don't name the place."""
    try:
        return parse(*args, **kwargs)
    except Exception as error:  # globox asserts and raises its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: can't be understood: {reason}") from error


def files_of(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: must be the folder of the {suffix} files")
    found = [p for p in folder.rglob("*") if p.suffix.lower() == suffix and p.name[0] != "."]
    if not found:
        raise UserError(f"{folder}: has no {suffix} file")
    return sorted(found)


def image_beside(path: Path, stated: str, images: Path) -> str:
    """An image relative to the folder of images: as stated, by its name alone, or as the file."""
    stated = stated.replace("\\", "/")
    places = [path.parent / stated, images / stated, images / Path(stated).name]
    places += [f.with_suffix(s) for f in (images / path.name, path) for s in IMAGE_SUFFIXES]
    found = next((place for place in places if place.is_file()), images / stated)
    return os.path.relpath(found, images)


def read_labelme(args: argparse.Namespace, found: Set) -> None:
    globox = import_globox()
    for path in files_of(args.annotations, ".json"):
        annotation = read(str(path), globox.Annotation.from_labelme, path, include_poly=True)
        shapes = len(load_json(str(path))["shapes"])
        name = image_beside(path, annotation.image_id, args.images)
        found.add(name, annotation.image_size, annotation.boxes, shapes - len(annotation.boxes))


def read_cvat(args: argparse.Namespace, found: Set) -> None:
    globox = import_globox()
    root = read(str(args.annotations), lambda: ET.parse(args.annotations).getroot())
    for node in root.iter("image"):
        what = f"{args.annotations}: image {node.get('name')!r}"
        annotation = read(what, globox.Annotation.from_cvat, node)
        left_out = sum(child.tag != "tag" for child in node) - len(annotation.boxes)
        angles = read(what, angles_of, node)
        boxes = [turned(*x) for x in zip(annotation.boxes, angles, strict=True)]
        found.add(annotation.image_id, annotation.image_size, boxes, left_out)
    if not found.images:
        raise UserError(f'{args.annotations}: has no <image>; export as "CVAT for images"')


def angles_of(image: ET.Element) -> list[float]:
    """Degrees by which CVAT's boxes are turned; globox leaves them out."""
    return [float(box.get("rotation") or 0) for box in image.iter("box")]


def turned(box: Any, degrees: float) -> Any:
    """The bounds of CVAT's box as it is shown: turned about its centre."""
    x, y, w, h = box.ltwh
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    width, height = w * cos + h * sin, w * sin + h * cos
    x, y = x + (w - width) / 2, y + (h - height) / 2
    return type(box)(label=box.label, xmin=x, ymin=y, xmax=x + width, ymax=y + height)


def read_via(args: argparse.Namespace, found: Set) -> None:
    globox = import_globox()
    content = load_json(str(args.annotations))
    entries = content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise UserError(f"{args.annotations}: not a file of VGG's Image Annotator")
    key = args.label_key or label_key(args.annotations, entries)
    for name, entry in entries.items():
        what = f"{args.annotations}: {name!r}"
        annotation = read(what, globox.Annotation.from_via_json, entry, label_key=key)
        left_out = len(entry["regions"]) - len(annotation.boxes)
        if odd := [box.label for box in annotation.boxes if not isinstance(box.label, str)]:
            raise UserError(f"{what}: the class must be a text, got {odd[0]!r}")
        found.add(annotation.image_id, None, annotation.boxes, left_out)


def label_key(path: Path, entries: dict[str, Any]) -> str:
    """The attribute that all regions have, if there is but one."""
    keys = read(str(path), lambda: {k for e in entries.values() for r in e["regions"]
                                    for k in r["region_attributes"]})  # fmt: skip
    if len(keys) > 1:
        names = ", ".join(sorted(keys))
        raise UserError(f"{path}: which attribute is the class? Give --label-key, one of {names}")
    return str(next(iter(keys), ""))


def read_voc(args: argparse.Namespace, found: Set) -> None:
    for path in files_of(args.annotations, ".xml"):
        content = path.read_bytes()
        scene = parse_voc_xml(str(path), content)
        stated = (parse_xml(str(path), content).findtext("filename") or path.stem).strip()
        found.images.append((image_beside(path, stated, args.images), *scene))


def read_openimages(args: argparse.Namespace, found: Set) -> None:
    """Read boxes of OpenImages; not by globox, which takes a group of things for one thing."""
    files = {p.stem: p.name for p in args.images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES}
    numbers: dict[str, int] = {}
    for i, row in enumerate(read(str(args.annotations), rows_of, args.annotations), start=2):
        what = f"{args.annotations}, line {i}"
        name, label, is_group, *shares = read(what, open_images_row, row)
        if name not in numbers:
            numbers[name] = len(found.images)
            found.add(files.get(name, name), None, [])
        _, width, height, objects = found.images[numbers[name]]
        x1, y1, x2, y2 = (s * side for s, side in zip(shares, (width, height) * 2, strict=True))
        objects.append((label, [x1, y1, x2 - x1, y2 - y1], {"iscrowd": is_group}))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as f:
        return list(csv.DictReader(f))


def open_images_row(row: dict[str, str]) -> tuple[Any, ...]:
    box = [float(row[key]) for key in ("XMin", "YMin", "XMax", "YMax")]
    return row["ImageID"], row["LabelName"], int(row.get("IsGroupOf") == "1"), *box


def run(args: argparse.Namespace) -> None:
    """Read, check the form, write, and say what to do next."""
    if not args.annotations.exists():
        raise UserError(f"{args.annotations}: not found")
    if args.images is None:
        is_folder = args.annotations.is_dir()
        args.images = args.annotations if is_folder else args.annotations.parent
    if not args.images.is_dir():
        raise UserError(f"--images {args.images}: not a folder")
    found = Set(args)
    readers = {"labelme": read_labelme, "cvat": read_cvat, "via": read_via, "voc": read_voc,
               "openimages": read_openimages}  # fmt: skip
    readers[args.format](args, found)
    content = clean_coco(named_content(found.images, args.classes))
    missing = missing_images(content, str(args.images))
    if missing:
        print(f"{len(missing)} of {len(content['images'])} images are missing, such as "
              f"{missing[0]!r}; --images names their folder", file=sys.stderr)  # fmt: skip
    if found.left_out:
        print(f"{found.left_out} shapes that are no boxes are left out", file=sys.stderr)
    write_text(args.output, json.dumps(content))
    classes = ", ".join(c["name"] for c in content["categories"])
    print(f"{len(content['images'])} images, {len(content['annotations'])} boxes, "
          f"classes: {classes}")  # fmt: skip
    print(f'DATASETS.COCO_JSON: [["NAME", "{args.output}", "{args.images}"]]')
