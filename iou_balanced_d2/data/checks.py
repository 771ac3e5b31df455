"""What can be known to be wrong with the data before training starts."""

import difflib
import logging
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .coco import check_image_folder, class_names, read_coco_json, register_datasets_of
from .conversion import is_converted, prepare_dataset
from .demo import ensure_demo_datasets
from .inspection import PROBLEMS, inspect_annotations, inspect_images
from .voc import check_difficult_policy

# Problems that no training can work around; the others leave out a box, or nothing.
_FATAL = ("unknown category", "duplicate id")
_MOST_NAMED = 5

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode, *, training: bool, read_images: bool = False) -> None:
    """Check that the config's data sets exist and fit the model; convert or draw what is used.

    Args:
        cfg: the full config.
        training: check DATASETS.TRAIN too, not only DATASETS.TEST.
        read_images: decode every image, and the annotations of detectron2's own data sets too.

    Raises:
        UserError: naming the data set, file, folder or key, and what to do.
    """
    register_datasets_of(cfg)
    check_difficult_policy(cfg.DATASETS.VOC_DIFFICULT)
    own = {entry[0] for entry in cfg.DATASETS.COCO_JSON}
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] if training else [*cfg.DATASETS.TEST]
    key = "DATASETS.TRAIN" if training else "DATASETS.TEST"
    if not getattr(cfg.DATASETS, key.split(".")[1]):
        raise UserError(f"{key} is empty: name at least one data set")
    for name in dict.fromkeys(names):
        _check_registered(name)
        prepare_dataset(name)
        # detectron2's data sets and the drawn one are trusted.
        trusted = name not in own and not is_converted(name)
        try:
            classes = _check(name, read=read_images or not trusted, read_images=read_images)
        except UserError as error:
            raise UserError(f"data set {name!r}: {error}") from error
        _check_num_classes(cfg, name, classes)


def _check(name: str, *, read: bool, read_images: bool) -> list[str]:
    """Check a data set's files, draw it if it is the demo's, and return its classes."""
    metadata = MetadataCatalog.get(name)
    if name.startswith("iou_balanced_demo_"):
        ensure_demo_datasets(str(Path(metadata.json_file).parents[2]))
    if read:
        return _check_files(metadata.json_file, metadata.image_root, read_images=read_images)
    for kind in ("json_file", "image_root"):
        path = metadata.get(kind)
        if path and not os.path.exists(path):
            raise UserError(
                f"{path!r} not found; set the environment variable DETECTRON2_DATASETS to the "
                "folder that holds the data sets"
            )
    return list(metadata.thing_classes)


def _check_files(json_file: str, image_root: str, *, read_images: bool) -> list[str]:
    """Read the annotations, and the images if asked to; return the classes."""
    content = read_coco_json(json_file)
    check_image_folder(image_root, content, json_file)
    report = inspect_annotations(content)
    for kind, places in report.problems.items():
        named = "; ".join(places[:_MOST_NAMED]) + ("; ..." if len(places) > _MOST_NAMED else "")
        if kind in _FATAL:
            raise UserError(f"{json_file}: {len(places)} x {kind}: {named}")
        logger.warning(f"{json_file}: {len(places)} x {kind} ({PROBLEMS[kind]}): {named}")
    if read_images:
        for kind, places in inspect_images(content, image_root).problems.items():
            raise UserError(f"{len(places)} x {kind}: {places[0]}")
    return class_names(content)


def _check_registered(name: str) -> None:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"data set {name!r} is not registered{hint} "
            "(data sets of one's own are registered by DATASETS.COCO_JSON)"
        )


def _check_num_classes(cfg: CfgNode, name: str, classes: list[str]) -> None:
    if "RetinaNet" not in cfg.MODEL.META_ARCHITECTURE or not classes:
        return
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    if num_classes != len(classes):
        shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise UserError(
            f"MODEL.RETINANET.NUM_CLASSES is {num_classes}, but data set "
            f"{name!r} has {len(classes)} classes ({shown}): set it to {len(classes)} "
            "(MODEL.ROI_HEADS.NUM_CLASSES has no effect on RetinaNet)"
        )
