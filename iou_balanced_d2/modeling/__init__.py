"""Detectors trained with the IoU-balanced losses; importing this registers them."""

from .interface import DetectorInterface, interface_of
from .iou_balanced_loss import IoUBalancedLoss
from .retinanet import IoUBalancedRetinaNet
from .tta import DenseDetectorWithTTA

__all__ = [
    "DenseDetectorWithTTA",
    "DetectorInterface",
    "IoUBalancedLoss",
    "IoUBalancedRetinaNet",
    "interface_of",
]
