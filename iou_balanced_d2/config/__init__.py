"""The config keys of this project, on top of detectron2's.

``python -m iou_balanced_d2.config`` prints each of them with its default and its meaning.
"""

from .defaults import add_iou_balanced_config, loss_options

__all__ = ["add_iou_balanced_config", "loss_options"]
