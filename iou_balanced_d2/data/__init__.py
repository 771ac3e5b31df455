"""Data sets: VOC, Cityscapes' boxes, one's own, and the drawn demo set. Registered by importing."""

import os

from .checks import check_datasets, known_classes
from .cityscapes import register_cityscapes
from .coco import register_coco_json, register_datasets_of
from .conversion import prepare_dataset
from .demo import register_demo_datasets
from .voc import check_difficult_policy, register_voc, register_voc_folder, training_dicts
from .yolo import register_yolo_folder

_root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
register_demo_datasets(_root)
register_voc(_root)
register_cityscapes(_root)

__all__ = [
    "check_datasets",
    "check_difficult_policy",
    "known_classes",
    "prepare_dataset",
    "register_coco_json",
    "register_datasets_of",
    "register_voc_folder",
    "register_yolo_folder",
    "training_dicts",
]
