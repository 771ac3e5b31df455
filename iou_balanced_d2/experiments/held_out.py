"""A part of the training data held out, to choose settings by without looking at the test data."""

import json
from pathlib import Path

from detectron2.data import MetadataCatalog

from ..data import prepare_dataset, register_datasets_of
from ..data.coco_format import read_coco_json
from ..data.layouts import split_images
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
        rest, held_out = split_images(content, share, name)
        for part, subset in (("held_out", held_out), ("rest", rest)):
            path = folder / f"{name}-{part}.json"
            write_text(path, json.dumps(subset))
            entries.append([f"{name}-{part}", str(path), metadata.image_root])
            parts[part].append(f"{name}-{part}")
    return settings | {
        "DATASETS.COCO_JSON": entries,
        "DATASETS.TRAIN": parts["rest"],
        "DATASETS.TEST": parts["held_out"],
    }
