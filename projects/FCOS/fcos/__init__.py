"""FCOS trained with the IoU-balanced losses; importing this registers it."""

from .backbone import build_fcos_fpn_backbone
from .config import add_fcos_config
from .fcos import FCOS, IoUBalancedFCOS

__all__ = ["FCOS", "IoUBalancedFCOS", "add_fcos_config", "build_fcos_fpn_backbone"]
