"""detectron2's FCOS from a config file, and FCOS trained with the IoU-balanced losses.

Letters: N images, R anchors (here points, one a location) of one image over all levels, R_l on
level l, K classes, P positives, L levels. Boxes are XYXY in absolute coordinates.
"""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn import functional as F

from iou_balanced_d2.config import loss_options
from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import DetectorInterface, IoUBalancedLoss
from iou_balanced_d2.modeling.positives import Positives, gather_rows

_NUM_POS_START = 300.0  # detectron2's FCOS


class FCOS(detectron2_fcos.FCOS):
    """detectron2's FCOS with a ``from_config``, which it lacks."""

    @configurable
    def __init__(self, **fcos: Any):
        """Build FCOS.

        Args:
            fcos: the arguments of :class:`detectron2.modeling.FCOS`.
        """
        super().__init__(**fcos)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of detectron2's FCOS from ``MODEL.FCOS``."""
        keys = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in keys.IN_FEATURES]
        head = detectron2_fcos.FCOSHead(
            input_shape=shapes,
            num_classes=keys.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * keys.NUM_CONVS,
            norm=keys.NORM,
            prior_prob=keys.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": keys.IN_FEATURES,
            "num_classes": keys.NUM_CLASSES,
            "center_sampling_radius": keys.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": keys.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": keys.FOCAL_LOSS_GAMMA,
            "test_score_thresh": keys.SCORE_THRESH_TEST,
            "test_topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": keys.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }


# Another project, or a later detectron2, may have registered the name; its FCOS stays.
if "FCOS" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(FCOS)


@META_ARCH_REGISTRY.register()
class IoUBalancedFCOS(FCOS, DetectorInterface):
    """detectron2's FCOS with another ``losses()``: same parameters, same inference.

    The classification loss is balanced by eq. 2, or is one of its rivals, and the GIoU loss by
    eq. 4; centerness stays as it is. The ``state_dict`` is FCOS's, so checkpoints load strictly
    both ways.
    """

    @configurable
    def __init__(self, *, iou_balanced: LossOptions, **fcos: Any):
        """Build FCOS and its losses.

        Args:
            iou_balanced: the keys of ``MODEL.IOU_BALANCED``.
            fcos: the arguments of :class:`FCOS`.

        Raises:
            ValueError: if an option is not for FCOS; the message names the key.
        """
        super().__init__(**fcos)
        measured = iou_balanced.loc_lambda > 0 and not iou_balanced.loc_weight
        if measured and iou_balanced.loc_weight_rule == "anchors":
            raise ValueError(
                "MODEL.IOU_BALANCED.LOC_WEIGHT_RULE must be first or running, got 'anchors': FCOS "
                "has points in place of anchors, so there are no boxes to measure w_loc with"
            )
        self.iou_balanced_loss = IoUBalancedLoss(
            num_classes=self.num_classes,
            box2box_transform=self.box2box_transform,
            options=iou_balanced,
            focal_loss_alpha=self.focal_loss_alpha,
            focal_loss_gamma=self.focal_loss_gamma,
            box_reg_loss_type="giou",
            num_pos_start=_NUM_POS_START,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """FCOS's arguments and the options of ``MODEL.IOU_BALANCED``."""
        return {**super().from_config(cfg), "iou_balanced": loss_options(cfg)}

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the three losses; arguments and keys are FCOS's.

        Args:
            anchors: L Boxes of R_l anchors.
            pred_logits: L tensors (N, R_l, K), any float precision.
            gt_labels: N tensors (R,) int64, class index; K is background.
            pred_anchor_deltas: L tensors (N, R_l, 4), distances to the edges in strides.
            gt_boxes: N tensors (R, 4), the box matched to each point; read at positives only.
            pred_centerness: L tensors (N, R_l, 1), logits.

        Returns:
            "loss_fcos_cls", "loss_fcos_loc" and "loss_fcos_ctr", float32 scalars, all divided by
            the same number.
        """

        def centerness_loss(positives: Positives, anchor: Tensor, gt: Tensor) -> dict[str, Tensor]:
            # float32 also under autocast, as the other two.
            centerness = gather_rows(pred_centerness, positives).squeeze(dim=1).float()
            # The function reads only the positives, so they pass as one level of one image.
            target = self.compute_ctrness_targets([Boxes(anchor)], [gt]).squeeze(dim=0)
            loss = F.binary_cross_entropy_with_logits(centerness, target, reduction="sum")
            return {"loss_ctr": loss}

        losses = self.iou_balanced_loss(
            anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, centerness_loss
        )
        return {
            "loss_fcos_cls": losses["loss_cls"],
            "loss_fcos_loc": losses["loss_box_reg"],
            "loss_fcos_ctr": losses["loss_ctr"],
        }


@BACKBONE_REGISTRY.register()
def build_fcos_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's pyramid on a ResNet, but with p6 and p7 computed from p5 instead of res5.

    See section 2.2 of https://arxiv.org/abs/2006.09214.

    Args:
        cfg: the full config; MODEL.RESNETS and MODEL.FPN are read, and ``res5`` must be among
            MODEL.FPN.IN_FEATURES.
        input_shape: of the images.

    Returns:
        the pyramid; with res3 to res5 it has the levels p3 to p7, strides 8 to 128.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
