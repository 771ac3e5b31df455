"""FCOS's feature pyramid, which detectron2 builds from a LazyConfig only."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7


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
