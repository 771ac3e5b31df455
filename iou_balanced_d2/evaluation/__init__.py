"""Evaluation of boxes: AP over IoU thresholds for any data set, and VOC's own metric."""

from .box_evaluator import BoxEvaluator, metric_names
from .matching import evaluate_boxes
from .metrics import coco_metrics
from .voc import voc_average_precision

__all__ = [
    "BoxEvaluator",
    "coco_metrics",
    "evaluate_boxes",
    "metric_names",
    "voc_average_precision",
]
