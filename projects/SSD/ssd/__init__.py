"""SSD with the IoU-balanced losses; importing this registers detectors, backbones and boxes."""

from .backbone import SSDBackbone, build_ssd_resnet_backbone, build_ssd_vgg_backbone
from .config import add_ssd_config
from .default_boxes import SSDDefaultBoxes, SSDMatcher
from .losses import SSDLoss
from .ssd import SSD, IoUBalancedSSD

__all__ = [
    "SSD",
    "IoUBalancedSSD",
    "SSDBackbone",
    "SSDDefaultBoxes",
    "SSDLoss",
    "SSDMatcher",
    "add_ssd_config",
    "build_ssd_resnet_backbone",
    "build_ssd_vgg_backbone",
]
