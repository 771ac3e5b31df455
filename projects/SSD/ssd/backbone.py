"""SSD's feature maps: those of a network, and of extra layers on top of it."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from .vgg import VGG16, xavier_init


class ExtraLayer(nn.Module):
    """A 1x1 convolution and one that makes the feature map smaller, each with ReLU."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        padding: int,
    ):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, mid_channels, 1)
        self.conv = nn.Conv2d(mid_channels, out_channels, kernel, stride, padding)
        xavier_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """From (N, in_channels, H, W) to (N, out_channels, H', W')."""
        return F.relu_(self.conv(F.relu_(self.reduce(x))))


class SSDBackbone(Backbone):
    """A network's feature maps, and those of the extra layers on top of the last of them."""

    def __init__(
        self, bottom_up: Backbone, in_features: Sequence[str], layers: Sequence[Sequence[int]]
    ):
        """Put extra layers on a network.

        Args:
            bottom_up: the network.
            in_features: its feature maps to detect on, from fine to coarse.
            layers: arguments of each :class:`ExtraLayer` from ``mid_channels`` on.
        """
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        shapes = bottom_up.output_shape()
        self._shapes = {name: shapes[name] for name in self.in_features}
        last, stride = (shapes[in_features[-1]].channels, shapes[in_features[-1]].stride)
        self.extra = nn.ModuleList()
        for i, (mid, out, kernel, layer_stride, padding) in enumerate(layers):
            self.extra.append(ExtraLayer(last, mid, out, kernel, layer_stride, padding))
            last, stride = out, stride * layer_stride
            self._shapes[f"extra{i + 1}"] = ShapeSpec(channels=last, stride=stride)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps by name, from fine to coarse.

        Args:
            x: images (N, 3, H, W), normalised.

        Returns:
            L tensors (N, C_l, H_l, W_l).
        """
        features = self.bottom_up(x)
        outputs = {name: features[name] for name in self.in_features}
        x = outputs[self.in_features[-1]]
        for i, layer in enumerate(self.extra):
            x = layer(x)
            outputs[f"extra{i + 1}"] = x
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map, from fine to coarse."""
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_ssd_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SSDBackbone:
    """VGG16 with extra layers, the backbone of the SSD paper.

    Args:
        cfg: the full config.
        input_shape: of the images.

    Returns:
        the backbone; MODEL.BACKBONE.FREEZE_AT stages of VGG16 (0 to 5) are not trained.
    """
    vgg = VGG16(input_shape.channels)
    vgg.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    return SSDBackbone(vgg, ("conv4_3", "fc7"), cfg.MODEL.SSD.EXTRA_LAYERS)


@BACKBONE_REGISTRY.register()
def build_ssd_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SSDBackbone:
    """detectron2's ResNet (MODEL.RESNETS) with extra layers.

    Args:
        cfg: the full config.
        input_shape: of the images.

    Returns:
        the backbone; MODEL.RESNETS.OUT_FEATURES are detected on, and then the extra layers.
    """
    resnet = build_resnet_backbone(cfg, input_shape)
    return SSDBackbone(resnet, cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.SSD.EXTRA_LAYERS)
