"""FCOS trained with the IoU-balanced losses; importing this registers it."""

from .config import add_fcos_config
from .fcos import FCOS, IoUBalancedFCOS, build_fcos_fpn_backbone

__all__ = ["FCOS", "IoUBalancedFCOS", "add_fcos_config", "build_fcos_fpn_backbone"]
