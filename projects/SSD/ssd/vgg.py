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
from torchvision.models.vgg import cfgs, make_layers


def xavier_init(module: nn.Module) -> None:
    """Give all convolutions in a module Xavier's uniform weights and no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class VGG16(Backbone):
    """Gives "conv4_3", normalised, of stride 8, and "fc7", of stride 16.

    The layers of ``features`` have the numbers that torchvision's VGG16 gives them.
    """

    def __init__(self, in_channels: int = 3):
        """Build the layers for images of so many channels; a checkpoint has the weights."""
        super().__init__()
        self.features = make_layers(cfgs["D"])
        self.features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        for conv in self.features:
            if isinstance(conv, nn.Conv2d):
                c2_msra_fill(conv)
        self._pools = [i for i, m in enumerate(self.features) if isinstance(m, nn.MaxPool2d)]
        # 75 pixels of SSD300 become 38, not 37. The last pool keeps the size.
        self.features[self._pools[2]].ceil_mode = True
        self.features[self._pools[4]] = nn.MaxPool2d(3, stride=1, padding=1)
        # ParseNet's scale of the channels; the SSD paper's 20.
        self.conv4_3_scale = nn.Parameter(torch.full((512,), 20.0))
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        xavier_init(self.fc6)
        xavier_init(self.fc7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps (N, 512, H/8, W/8) and (N, 1024, H/16, W/16), rounded up once."""
        conv4_3 = self.features[: self._pools[3]](x)
        x = self.features[self._pools[3] :](conv4_3)
        x = F.relu_(self.fc7(F.relu_(self.fc6(x))))
        return {"conv4_3": self.conv4_3_scale.view(1, -1, 1, 1) * F.normalize(conv4_3), "fc7": x}

    def freeze(self, num_stages: int) -> None:
        """Exclude the first stages (0 to 5) from training."""
        end = self._pools[num_stages - 1] if num_stages else 0
        self.features[:end].requires_grad_(False)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of both feature maps."""
        return {
            "conv4_3": ShapeSpec(channels=512, stride=8),
            "fc7": ShapeSpec(channels=1024, stride=16),
        }
