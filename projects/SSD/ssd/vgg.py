"""VGG16 as SSD uses it: fc6 and fc7 as convolutions, conv4_3 with its length normalised.

Sources: Simonyan and Zisserman, arXiv 1409.1556; Liu et al., "SSD: Single Shot MultiBox Detector",
arXiv 1512.02325, section 3.
"""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn import functional as F

# Channels and convolutions of the five stages.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def xavier_init(module: nn.Module) -> None:
    """Give all convolutions in a module Xavier's uniform weights and no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class L2Norm(nn.Module):
    """Normalise each pixel's channels to length 1, times a learnt scale a channel (ParseNet)."""

    def __init__(self, channels: int, scale: float = 20.0):
        """Start with one scale for all channels.

        Args:
            channels: C.
            scale: the paper's 20.
        """
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """From (N, C, H, W) to the same shape."""
        return self.scale.view(1, -1, 1, 1) * F.normalize(x)


class VGG16(Backbone):
    """Gives "conv4_3", normalised, of stride 8, and "fc7", of stride 16."""

    def __init__(self, in_channels: int = 3):
        """Build the layers; weights come from a checkpoint (MODEL.WEIGHTS).

        Args:
            in_channels: of the images.
        """
        super().__init__()
        for stage, (channels, num_convs) in enumerate(STAGES, start=1):
            for i in range(1, num_convs + 1):
                conv = nn.Conv2d(in_channels, channels, 3, padding=1)
                c2_msra_fill(conv)
                self.add_module(f"conv{stage}_{i}", conv)
                in_channels = channels
        self.conv4_3_norm = L2Norm(512)
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        xavier_init(self.fc6)
        xavier_init(self.fc7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps (N, 512, H/8, W/8) and (N, 1024, H/16, W/16), rounded up at the third pool.

        Args:
            x: images (N, 3, H, W), normalised.
        """
        for stage in range(1, 5):
            if stage > 1:
                # 75 pixels of SSD300 become 38, not 37.
                x = F.max_pool2d(x, 2, ceil_mode=stage == 4)
            x = self._stage(x, stage)
        conv4_3 = x
        x = self._stage(F.max_pool2d(x, 2), 5)
        x = F.max_pool2d(x, 3, stride=1, padding=1)
        x = F.relu_(self.fc7(F.relu_(self.fc6(x))))
        return {"conv4_3": self.conv4_3_norm(conv4_3), "fc7": x}

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        for i in range(1, STAGES[stage - 1][1] + 1):
            x = F.relu_(getattr(self, f"conv{stage}_{i}")(x))
        return x

    def freeze(self, num_stages: int) -> None:
        """Exclude the first stages (0 to 5) from training."""
        for stage, (_, num_convs) in enumerate(STAGES[:num_stages], start=1):
            for i in range(1, num_convs + 1):
                getattr(self, f"conv{stage}_{i}").requires_grad_(False)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of both feature maps."""
        return {
            "conv4_3": ShapeSpec(channels=512, stride=8),
            "fc7": ShapeSpec(channels=1024, stride=16),
        }
