"""A part of the training data held out, to choose settings by without looking at the test data."""

import json
import random
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from ..data import prepare_dataset, register_datasets_of
from ..data.coco_format import read_coco_json
from ..engine import load_config
from ..errors import UserError
from ..files import write_text
from .protocol import Settings


def hold_out(config: Path, settings: Settings, share: float, folder: Path) -> Settings:
    """Split the images of DATASETS.TRAIN into two parts, drawn by a fixed seed.

    Args:
        config: detectron2 config file.
        settings: the data set's keys.
        share: of the images to hold out, above 0.
        folder: the two COCO JSON files of each training set are written here.

    Returns:
        the settings that train on the rest and test on the part held out.

    Raises:
        UserError: if a data set is missing, or a part would be without images.
    """
    # Values as they would be written on a command line.
    pairs = [(key, v if isinstance(v, str) else repr(v)) for key, v in settings.items()]
    cfg = load_config(str(config), [x for pair in pairs for x in pair])
    register_datasets_of(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    entries = [list(entry) for entry in cfg.DATASETS.COCO_JSON]
    parts: dict[str, list[str]] = {"rest": [], "held_out": []}
    for name in cfg.DATASETS.TRAIN:
        prepare_dataset(name)
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if json_file is None:
            raise UserError(f"data set {name!r} has no COCO JSON file that a part can be taken of")
        content = read_coco_json(json_file)
        for part, subset in _split(content, share, name).items():
            path = folder / f"{name}-{part}.json"
            write_text(path, json.dumps(subset))
            entries.append([f"{name}-{part}", str(path), metadata.image_root])
            parts[part].append(f"{name}-{part}")
    return settings | {
        "DATASETS.COCO_JSON": entries,
        "DATASETS.TRAIN": parts["rest"],
        "DATASETS.TEST": parts["held_out"],
    }


def _split(content: dict[str, Any], share: float, name: str) -> dict[str, dict[str, Any]]:
    ids = sorted(image["id"] for image in content["images"])
    drawn = set(random.Random(0).sample(ids, round(share * len(ids))))
    if not 0 < len(drawn) < len(ids):
        raise UserError(f"data set {name!r}: {len(ids)} images, too few to hold out {share:.0%}")
    return {
        "held_out": _subset(content, drawn),
        "rest": _subset(content, set(ids) - drawn),
    }


def _subset(content: dict[str, Any], ids: set[Any]) -> dict[str, Any]:
    return content | {
        "images": [image for image in content["images"] if image["id"] in ids],
        "annotations": [a for a in content["annotations"] if a["image_id"] in ids],
    }
