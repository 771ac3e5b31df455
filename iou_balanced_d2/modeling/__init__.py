"""Detectors trained with the IoU-balanced losses; importing this registers them."""

from .iou_balanced_loss import IoUBalancedLoss
from .retinanet import IoUBalancedRetinaNet

__all__ = ["IoUBalancedLoss", "IoUBalancedRetinaNet"]
