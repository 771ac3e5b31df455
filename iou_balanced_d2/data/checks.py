"""Checks of the data before training starts."""

import contextlib
import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO

from ..errors import UserError
from .anchors import anchor_advice, anchor_recall, mean_recall, recall_in_words
from .coco import check_folder, register_datasets_of
from .coco_format import REPAIRS, class_names, read_coco_json
from .conversion import ConvertedDataset, prepare_dataset
from .demo import ensure_demo_datasets
from .inspection import FATAL, PROBLEMS, inspect, trained_on
from .voc import check_difficult_policy
from .yolo import YoloSource

_MOST_NAMED = 5
# A detector whose anchors miss more than this share of the boxes can't learn to place them.
LOW_RECALL = 0.7

# detectron2's own, which are large and known to be right, and the drawn one.
_TRUSTED = {
    *(name for names in _PREDEFINED_SPLITS_COCO.values() for name in names),
    *(f"iou_balanced_demo_{split}" for split in ("train", "val")),
}

Look = Callable[[str, dict[str, Any]], None]

logger = logging.getLogger(__name__)


def check_datasets(
    cfg: CfgNode, *, training: bool, read_images: bool = False, look: Look | None = None
) -> None:
    """Check that the config's data sets exist and fit the model; convert or draw what is used.

    Args:
        cfg: the full config.
        training: check DATASETS.TRAIN too, not only DATASETS.TEST.
        read_images: decode every image, and the annotations of detectron2's own data sets too.
        look: called with the name and the clean content of each data set that has a JSON file,
            in place of the search for bad annotations and images that ends in an error.

    Raises:
        UserError: naming the data set, file, folder or key, and what to do.
    """
    register_datasets_of(cfg)
    check_difficult_policy(cfg.DATASETS.VOC_DIFFICULT)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] if training else [*cfg.DATASETS.TEST]
    key = "DATASETS.TRAIN" if training else "DATASETS.TEST"
    if not getattr(cfg.DATASETS, key.split(".")[1]):
        raise UserError(f"{key} is empty: name at least one data set")
    known: dict[str, list[str]] = {}
    empty: set[str] = set()
    for name in dict.fromkeys(names):
        _check_registered(name)
        prepare_dataset(name)
        if name.startswith("iou_balanced_demo_"):
            ensure_demo_datasets(str(Path(MetadataCatalog.get(name).json_file).parents[2]))
        try:
            classes, has_boxes = _check_dataset(cfg, name, read_images=read_images, look=look)
        except UserError as error:
            raise UserError(f"data set {name!r}: {error}") from error
        _check_num_classes(cfg, name, classes)
        _check_same_classes(known, name, classes)
        if not has_boxes:
            empty.add(name)
    _check_boxes(cfg, empty, training=training, looking=look is not None)


def _check_dataset(
    cfg: CfgNode, name: str, *, read_images: bool, look: Look | None
) -> tuple[list[str], bool]:
    """Check one data set; returns its classes, and whether it may have a usable box."""
    classes = _check_known(name) if name in _TRUSTED else []
    if name in _TRUSTED and not read_images and look is None:
        return classes, True
    if {"json_file", "image_root"} <= MetadataCatalog.get(name).as_dict().keys():
        content = read_coco_json(MetadataCatalog.get(name).json_file)
        check_folder(MetadataCatalog.get(name).image_root)
        if look is None:
            _check_content(cfg, name, content, read_images=read_images)
        else:
            look(name, content)
        return class_names(content), bool(trained_on(content, cfg.DATASETS.VOC_DIFFICULT))
    classes = _check_records(name)
    if not classes and name in cfg.DATASETS.TEST:
        raise UserError(
            "the evaluation needs its classes: set MetadataCatalog.get("
            f"{name!r}).thing_classes to their names"
        )
    return classes, True


def _check_boxes(cfg: CfgNode, empty: set[str], *, training: bool, looking: bool) -> None:
    """Refuse to train, or to be judged, on data sets that are all ``empty``."""
    if training and empty >= set(cfg.DATASETS.TRAIN):
        hint = _label_hint(cfg.DATASETS.TRAIN[0])
        raise UserError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: no image has a usable box{hint}"
        )
    for name in (name for name in cfg.DATASETS.TEST if name in empty):
        text = (
            f"DATASETS.TEST {name!r}: no image has a usable box{_label_hint(name)}: there is no AP "
            "without annotations"
        )
        if training and not looking and empty >= set(cfg.DATASETS.TEST):
            raise UserError(f"{text} (--eval-only writes detections without them)")
        logger.warning(text)


def _label_hint(name: str) -> str:
    """Why a data set has no object, where that is plain: no image has a label file."""
    source = getattr(DatasetCatalog[name], "source", None)
    missing = source.without_labels() if isinstance(source, YoloSource) else ""
    return missing and f": none of its images has a label file, such as {missing}"


def detector_node(cfg: CfgNode) -> str | None:
    """Name of the node of ``cfg.MODEL`` that holds the detector's keys, NUM_CLASSES among them.

    It is part of META_ARCHITECTURE: "RETINANET" for "IoUBalancedRetinaNet"; two-stage ones have
    none.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE.upper()
    for name, node in cfg.MODEL.items():
        if isinstance(node, CfgNode) and "NUM_CLASSES" in node and name in architecture:
            return str(name)
    return None


def known_classes(cfg: CfgNode) -> list[str]:
    """The classes in their order, by the first of the config's data sets that is here and fits.

    Args:
        cfg: the full config, its own data sets registered.

    Returns:
        the names; empty if no data set can be read, or none has as many as the detector.
    """
    node = detector_node(cfg)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        with contextlib.suppress(UserError):  # its files are not here
            prepare_dataset(name)
        names = MetadataCatalog.get(name).get("thing_classes", [])
        if names and (node is None or len(names) == cfg.MODEL[node].NUM_CLASSES):
            return list(names)
    return []


def _check_same_classes(known: dict[str, list[str]], name: str, classes: list[str]) -> None:
    """A class is its position in the list, so all data sets of a run need the same list."""
    for other, expected in known.items():
        if classes and expected and classes != expected:
            raise UserError(
                f"data sets {other!r} and {name!r} have different classes, or in another order: "
                f"{', '.join(expected[:8])} against {', '.join(classes[:8])}"
            )
    known[name] = classes


def _check_known(name: str) -> list[str]:
    """Check that the files of a trusted data set are there; return its classes."""
    metadata = MetadataCatalog.get(name)
    for kind in ("json_file", "image_root"):
        path = metadata.get(kind)
        if path and not os.path.exists(path):
            raise UserError(
                f"{path!r} not found; set the environment variable DETECTRON2_DATASETS to the "
                "folder that holds the data sets"
            )
    return list(metadata.get("thing_classes", []))


def _check_records(name: str) -> list[str]:
    """Check what a function that was registered in Python returns; return the classes."""
    records = DatasetCatalog.get(name)  # may set the metadata, as load_coco_json does
    classes = list(MetadataCatalog.get(name).get("thing_classes", []))
    for i, record in enumerate(records):
        for key in ("file_name", "image_id", "height", "width"):
            if key not in record:
                raise UserError(f"record {i} has no {key!r}")
        if not os.path.isfile(record["file_name"]):
            raise UserError(f"record {i}: image {record['file_name']!r} is not there")
        for j, annotation in enumerate(record.get("annotations", [])):
            for key in ("bbox", "bbox_mode", "category_id"):
                if key not in annotation:
                    raise UserError(f"record {i}: annotations[{j}] has no {key!r}")
            label = annotation["category_id"]
            if classes and label not in range(len(classes)):
                raise UserError(
                    f"record {i}: annotations[{j}]: category_id must be 0 to {len(classes) - 1}, "
                    f"got {label!r}"
                )
    return classes


def _check_content(cfg: CfgNode, name: str, content: dict[str, Any], *, read_images: bool) -> None:
    """Look for what is wrong with a data set's annotations, and its images if asked to."""
    image_root = MetadataCatalog.get(name).image_root
    report = inspect(cfg, content, image_root, read_images=read_images)
    for kind, (number, place) in report.repairs.items():
        logger.warning(f"data set {name!r}: {number} x {kind}: {place}, ... ({REPAIRS[kind]})")
    # The path by which the user knows the annotations.
    known = DatasetCatalog[name]
    is_converted = isinstance(known, ConvertedDataset)
    path = known.source.path if is_converted else MetadataCatalog.get(name).json_file
    for kind, places in report.problems.items():
        if kind not in FATAL:
            logger.warning(f"data set {name!r}: {path}: {_named({kind: places})}")
    if fatal := {kind: places for kind, places in report.problems.items() if kind in FATAL}:
        raise UserError(f"{path}: {_named(fatal)}")
    if name in cfg.DATASETS.TRAIN and "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        recalls = anchor_recall(cfg, content)
        if mean_recall(recalls) < LOW_RECALL:
            threshold = cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
            logger.warning(
                f"data set {name!r}: only {recall_in_words(recalls)} meet an anchor at IoU "
                f"{threshold}; {anchor_advice(cfg, content)}"
            )


def _named(problems: dict[str, list[str]]) -> str:
    """All kinds of problems in one line: the number, the first places, what it means."""
    parts = []
    for kind, places in problems.items():
        shown = [*places[:_MOST_NAMED], "..."] if len(places) > _MOST_NAMED else places
        parts.append(f"{len(places)} x {kind}: {'; '.join(shown)} ({PROBLEMS[kind]})")
    return "; ".join(parts)


def _check_registered(name: str) -> None:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"data set {name!r} is not registered{hint} "
            "(data sets of one's own are registered by DATASETS.COCO_JSON)"
        )


def _check_num_classes(cfg: CfgNode, name: str, classes: list[str]) -> None:
    node = detector_node(cfg)
    if not node or not classes:
        return
    num_classes = cfg.MODEL[node].NUM_CLASSES
    if num_classes != len(classes):
        shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise UserError(
            f"MODEL.{node}.NUM_CLASSES is {num_classes}, but data set "
            f"{name!r} has {len(classes)} classes ({shown}): set it to {len(classes)} "
            f"(MODEL.ROI_HEADS.NUM_CLASSES has no effect on {cfg.MODEL.META_ARCHITECTURE})"
        )
