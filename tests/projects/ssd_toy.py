"""A tiny SSD, for tests that need a whole detector in milliseconds."""

from pathlib import Path

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from iou_balanced_d2.engine import load_config
from iou_balanced_d2.projects.ssd import SSDBackbone

CONFIGS = Path(__file__).parents[2] / "projects/SSD/configs"
NUM_CLASSES = 3


class TinyNet(Backbone):
    """Five convolutions with normalisation: feature maps of stride 8 and 16."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList()
        for before, after, stride in ((3, 16, 2), (16, 32, 2), (32, 32, 2), (32, 64, 2)):
            conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU()))

    def forward(self, x):
        outputs = {}
        for i, stage in enumerate(self.stages, start=1):
            x = outputs[f"s{2**i}"] = stage(x)
        return outputs

    def output_shape(self):
        return {"s8": ShapeSpec(channels=32, stride=8), "s16": ShapeSpec(channels=64, stride=16)}


@BACKBONE_REGISTRY.register()
def build_tiny_ssd_backbone(cfg, input_shape):
    return SSDBackbone(TinyNet(), ("s8", "s16"), cfg.MODEL.SSD.EXTRA_LAYERS)


TOY = (
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.BACKBONE.NAME", "build_tiny_ssd_backbone",
    "MODEL.SSD.NUM_CLASSES", NUM_CLASSES,
    "MODEL.SSD.SIZE", 128,
    "MODEL.SSD.EXTRA_LAYERS", [[32, 64, 3, 2, 1]],
    "MODEL.SSD.SCALES", [0.12, 0.25, 0.5, 0.9],
    "MODEL.SSD.ASPECT_RATIOS", [[2], [2], [2]],
    "MODEL.SSD.STEPS", [8, 16, 32],
)  # fmt: skip


def toy_config(*opts, config="COCO-Detection/ssd300_VGG16_iou_balanced.yaml"):
    """Config of the tiny SSD at 128 pixels on the CPU, with KEY VALUE overrides."""
    return load_config(str(CONFIGS / config), [*TOY, *opts])


def toy_model(*opts):
    """The model of :func:`toy_config`, seeded."""
    torch.manual_seed(0)
    return build_model(toy_config(*opts))
