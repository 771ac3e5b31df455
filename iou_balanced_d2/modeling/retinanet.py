"""RetinaNet trained with the IoU-balanced losses."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..config import loss_options
from ..losses import LossOptions
from . import matching
from .iou_balanced_loss import IoUBalancedLoss


@META_ARCH_REGISTRY.register()
class IoUBalancedRetinaNet(RetinaNet):
    """detectron2's RetinaNet with another ``losses()``: same parameters, same inference.

    Anchors get the same labels, in less time and memory. Its ``state_dict`` is RetinaNet's, so
    checkpoints load strictly both ways.
    """

    @configurable
    def __init__(self, *, iou_balanced: LossOptions, **retinanet: Any):
        """Build RetinaNet and its losses.

        Args:
            iou_balanced: the keys of ``MODEL.IOU_BALANCED``.
            retinanet: the arguments of :class:`detectron2.modeling.RetinaNet`.
        """
        super().__init__(**retinanet)
        self.iou_balanced_loss = IoUBalancedLoss(
            num_classes=self.num_classes,
            box2box_transform=self.box2box_transform,
            options=iou_balanced,
            focal_loss_alpha=self.focal_loss_alpha,
            focal_loss_gamma=self.focal_loss_gamma,
            smooth_l1_beta=self.smooth_l1_beta,
            box_reg_loss_type=self.box_reg_loss_type,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """RetinaNet's arguments and the options of ``MODEL.IOU_BALANCED``."""
        return {**super().from_config(cfg), "iou_balanced": loss_options(cfg)}

    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :func:`.matching.label_anchors`; arguments and results are RetinaNet's."""
        return matching.label_anchors(anchors, gt_instances, self.anchor_matcher, self.num_classes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See :meth:`IoUBalancedLoss.forward`; arguments and keys are RetinaNet's."""
        return self.iou_balanced_loss(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
