"""Which data set a folder holds: COCO's, VOC's or YOLO's layout, and its splits."""

import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..files import read_yaml
from .coco_format import clean_coco, load_json, read_coco_json
from .conversion import CACHE_FOLDER, Source
from .formats import hint_for_folder
from .voc import VocSource
from .yolo import YoloSource

# Where splits are kept that a set without any got; no data set of its own.
SPLITS_FOLDER = "iou_balanced_splits"
_DEPTH = 3  # folders below the data set's in which files are looked for
# Words of file and folder names, in the order in which they are looked for.
_SPLIT_OF = {"train": "train", "val": "valid", "dev": "valid", "test": "test"}


@dataclass(frozen=True)
class Split:
    """A split of a data set."""

    key: str  # of the config, "COCO_JSON", "VOC_FOLDER" or "YOLO_FOLDER" of DATASETS
    place: list[str]  # what stands behind the name in the key's entry, paths absolute
    content: dict[str, Any]  # clean, see :func:`~iou_balanced_d2.data.coco_format.read_coco_json`
    image_root: str  # what the images' file names are relative to


def find_splits(folder: Path) -> dict[str, Split]:
    """Recognise the layout of a data set and read its splits: "train", "valid" and "test".

    "train" is all of a set without splits.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name the one that holds photos and annotations")
    folder = folder.resolve()
    found = _yolo(folder) or _voc(folder) or _coco(folder)
    if not found:
        raise UserError(
            f"{folder}: neither COCO's layout (JSON files with images, annotations and categories) "
            "nor VOC's (Annotations, JPEGImages) nor YOLO's (data.yaml); other formats are read by "
            f"iou-balanced-d2 convert{hint_for_folder(str(folder))}"
        )
    if "train" not in found:
        raise UserError(f"{folder}: has a split {', '.join(found)}, but none to train on")
    return {name: found[name] for name in ("train", "valid", "test") if name in found}


def split_images(
    content: dict[str, Any], share: float, name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw a share of the images by a fixed seed: content of the others, and of those drawn."""
    ids = sorted(image["id"] for image in content["images"])
    drawn = set(random.Random(0).sample(ids, round(share * len(ids))))
    if not 0 < len(drawn) < len(ids):
        raise UserError(f"data set {name!r}: {len(ids)} images, too few to hold out {share:.0%}")
    return _subset(content, set(ids) - drawn), _subset(content, drawn)


def _subset(content: dict[str, Any], ids: set[Any]) -> dict[str, Any]:
    return content | {
        "images": [image for image in content["images"] if image["id"] in ids],
        "annotations": [a for a in content["annotations"] if a["image_id"] in ids],
    }


def _split_of(path: Path, folder: Path) -> str | None:
    """By a word of its name, or else of the nearest folder that has one."""
    names = [name.lower() for name in reversed(path.relative_to(folder).parts)]
    return next((s for name in names for word, s in _SPLIT_OF.items() if word in name), None)


def _convert(key: str, place: list[str], source: Source) -> Split:
    return Split(key, place, clean_coco(source.convert()), source.image_root)


def _yolo(folder: Path) -> dict[str, Split]:
    for file in sorted(folder.glob("*.y*ml"), key=lambda f: f.name != "data.yaml"):
        try:
            content = read_yaml(file)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            continue
        except UserError:
            if file.name == "data.yaml":
                raise
            continue
        if isinstance(content, dict) and {"names", "train"} <= content.keys():
            return {
                split: _convert("YOLO_FOLDER", [str(file), name], YoloSource(str(file), name))
                for name, split in (("train", "train"), ("val", "valid"), ("test", "test"))
                if content.get(name)
            }
    return {}


def _voc(folder: Path) -> dict[str, Split]:
    if not ((folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()):
        return {}
    lists = {path.stem for path in folder.glob("ImageSets/Main/*.txt")}
    chosen = {
        split: next((name for name in names if name in lists), None)
        for split, names in {
            "train": ("train", "trainval"), "valid": ("val", "valid"), "test": ("test",),
        }.items()
    }  # fmt: skip
    if not chosen["train"]:
        source = VocSource(str(folder), (("", ""),), None)  # which COCO's content is made of,
        return {"train": _convert("", [], source)}  # since no list can be named
    return {
        split: _convert(
            "VOC_FOLDER", [str(folder), name], VocSource(str(folder), (("", name),), None)
        )
        for split, name in chosen.items()
        if name
    }


def _coco(folder: Path) -> dict[str, Split]:
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    every_file = (path / name for path, names in _walk(folder) for name in sorted(names))
    for file in (file for file in every_file if file.suffix.lower() == ".json"):
        content = load_json(str(file))
        if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
            found.setdefault(_split_of(file, folder) or "train", []).append((file, content))
    alone = len(found) == 1 and all(len(files) == 1 for files in found.values())
    if alone:  # whatever its name: latest.json is no test
        found = {"train": next(iter(found.values()))}
    splits = {}
    for split, files in found.items():
        # Beside COCO's instances there are key points of the same images.
        files = [x for x in files if x[0].stem.startswith("instances")] or files
        if len(files) > 1:
            names = " and ".join(str(file) for file, _ in files[:2])
            raise UserError(f"{names}: both could be the {split} split; move one of them away")
        file, content = files[0]
        clean = read_coco_json(str(file), content)
        root = _image_root(folder, file, clean)
        splits[split] = Split("COCO_JSON", [str(file), root], clean, root)
    return splits


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and their files, some levels deep, without hidden ones and our own."""
    for path, folders, files in os.walk(folder):
        depth = len(Path(path).relative_to(folder).parts)
        usable = [f for f in folders if f[0] != "." and f not in (CACHE_FOLDER, SPLITS_FOLDER)]
        folders[:] = sorted(usable) if depth < _DEPTH else []
        yield Path(path), files


def _image_root(folder: Path, file: Path, content: dict[str, Any]) -> str:
    """The folder that has the images of a COCO file: that beside it, or one of the data set's."""
    names = [content["images"][i]["file_name"] for i in (0, -1)]
    places = (file.parent, *(path for path, _ in _walk(folder)))
    roots = [path for path in places if all((path / name).is_file() for name in names)]
    if not roots:
        raise UserError(f"{file}: its images ({names[0]}, ...) are in no folder below {folder}")
    if roots[0] != file.parent and len(roots) > 1:
        split = _split_of(file, folder)
        roots = [path for path in roots if split and _split_of(path, folder) == split] or roots
        parts = {path: [x.lower() for x in path.relative_to(folder).parts] for path in roots}
        roots = [path for path in roots if "images" in parts[path]] or roots
        if len(roots) > 1:
            raise UserError(
                f"{file}: {roots[0]} and {roots[1]} both have its images ({names[0]}, ...): move "
                f"the wrong one out of {folder}, or name the other in a config's DATASETS.COCO_JSON"
            )
    return str(roots[0])


def dataset_name(folder: Path, split: str) -> str:
    """A name for a split, which also names a folder: "vehicles_train"."""
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', folder.resolve().name).strip('_.')}_{split}"
