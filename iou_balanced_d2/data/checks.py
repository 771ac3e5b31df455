"""What can be known to be wrong with the data before training starts."""

import difflib
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .coco import check_image_folder, class_names, read_coco_json, register_datasets_of
from .demo import ensure_demo_datasets


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Check that the config's data sets exist and fit the model; draw the demo set if it is used.

    Args:
        cfg: the full config.
        training: check DATASETS.TRAIN too, not only DATASETS.TEST.

    Raises:
        UserError: naming the data set, file, folder or key, and what to do.
    """
    register_datasets_of(cfg)
    own = {name for name, _, _ in cfg.DATASETS.COCO_JSON}
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] if training else [*cfg.DATASETS.TEST]
    key = "DATASETS.TRAIN" if training else "DATASETS.TEST"
    if not getattr(cfg.DATASETS, key.split(".")[1]):
        raise UserError(f"{key} is empty: name at least one data set")
    for name in dict.fromkeys(names):
        _check_registered(name)
        classes = _check_own(name) if name in own else _check_known(name)
        _check_num_classes(cfg, name, classes)


def _check_registered(name: str) -> None:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"data set {name!r} is not registered{hint} "
            "(data sets of one's own are registered by DATASETS.COCO_JSON)"
        )


def _check_own(name: str) -> list[str]:
    """Read the annotations of a data set of one's own; return its classes."""
    metadata = MetadataCatalog.get(name)
    try:
        content = read_coco_json(metadata.json_file)
        check_image_folder(metadata.image_root, content, metadata.json_file)
    except UserError as error:
        raise UserError(f"data set {name!r}: {error}") from error
    return class_names(content)


def _check_known(name: str) -> list[str]:
    """Check that the files of a data set that detectron2 knows are there; return its classes."""
    metadata = MetadataCatalog.get(name)
    if name.startswith("iou_balanced_demo_"):
        ensure_demo_datasets(str(Path(metadata.json_file).parents[2]))
    for kind in ("json_file", "image_root"):
        path = metadata.get(kind)
        if path and not os.path.exists(path):
            raise UserError(
                f"data set {name!r}: {path!r} not found; set the environment variable "
                "DETECTRON2_DATASETS to the folder that holds the data sets"
            )
    return metadata.get("thing_classes", [])


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
