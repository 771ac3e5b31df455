"""The IoU-balanced losses as pure tensor functions (torch and fvcore only, no detectron2).

Source of the equations: Wu, Yang, Wang, Li, "IoU-balanced Loss Functions for Single-stage
Object Detection", arXiv 1908.05641.
"""

from .balanced import iou_balanced_cross_entropy, iou_balanced_smooth_l1_loss
from .focal import iou_balanced_sigmoid_focal_loss, sigmoid_focal_loss
from .options import LossOptions
from .soft_targets import quality_focal_loss, varifocal_loss
from .weights import iou_balanced_cls_weights, iou_balanced_loc_weights, measure_w_loc

__all__ = [
    "LossOptions",
    "iou_balanced_cls_weights",
    "iou_balanced_cross_entropy",
    "iou_balanced_loc_weights",
    "iou_balanced_sigmoid_focal_loss",
    "iou_balanced_smooth_l1_loss",
    "measure_w_loc",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "varifocal_loss",
]
