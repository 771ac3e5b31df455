"""The project's configs and models, from a checkout or from an installed wheel.

As ``detectron2.model_zoo``::

    from iou_balanced_d2 import model_zoo
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml")
    model = model_zoo.get("FCOS/COCO-Detection/fcos_R_50_FPN_1x_iou_balanced.yaml")
"""

from .model_zoo import (
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    get_detectron2_config,
)

__all__ = [
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "get_detectron2_config",
]
