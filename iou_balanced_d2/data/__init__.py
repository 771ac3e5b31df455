"""Data sets: one's own from COCO JSON, and the generated demo set. Registered by importing."""

import os

from .checks import check_datasets
from .coco import register_coco_json, register_datasets_of
from .demo import register_demo_datasets

register_demo_datasets(os.environ.get("DETECTRON2_DATASETS", "datasets"))

__all__ = ["check_datasets", "register_coco_json", "register_datasets_of"]
