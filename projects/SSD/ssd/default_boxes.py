"""SSD's default boxes and how they are matched with the ground truth."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from torch import Tensor, nn


@ANCHOR_GENERATOR_REGISTRY.register()
class SSDDefaultBoxes(DefaultAnchorGenerator):
    """detectron2's grid of anchors with the shapes of the SSD paper, section 2.2.

    Boxes are given in pixels of the fixed image size, and may reach over the image's border.
    """

    @configurable
    def __init__(
        self,
        *,
        size: int,
        scales: Sequence[float],
        aspect_ratios: Sequence[Sequence[float]],
        steps: Sequence[int],
    ):
        """Set the shapes.

        Args:
            size: side of the images in pixels.
            scales: L + 1 shares of it, s_k of each feature map and one more.
            aspect_ratios: L lists of ratios besides 1; each gives a wide and a high box.
            steps: L distances between centres in pixels.

        Raises:
            ValueError: if the lengths do not fit.
        """
        nn.Module.__init__(self)
        if not len(scales) - 1 == len(aspect_ratios) == len(steps):
            raise ValueError(
                "expected one more of MODEL.SSD.SCALES than of ASPECT_RATIOS and STEPS, got "
                f"{len(scales)}, {len(aspect_ratios)} and {len(steps)}"
            )
        self.size = size
        self.strides = list(steps)
        self.num_features = len(steps)
        self.offset = 0.5
        self.cell_anchors = BufferList(
            _cell_boxes(size, *pair, ratios)
            for pair, ratios in zip(pairwise(scales), aspect_ratios, strict=True)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """The keys of ``MODEL.SSD``.

        Raises:
            ValueError: if they are for another number of feature maps.
        """
        keys = cfg.MODEL.SSD
        if len(keys.STEPS) != len(input_shape):
            raise ValueError(
                f"MODEL.SSD.STEPS has {len(keys.STEPS)} entries, but there are {len(input_shape)} "
                "feature maps"
            )
        return {
            "size": keys.SIZE,
            "scales": keys.SCALES,
            "aspect_ratios": keys.ASPECT_RATIOS,
            "steps": keys.STEPS,
        }


def _cell_boxes(size: int, scale: float, next_scale: float, ratios: Sequence[float]) -> Tensor:
    """The boxes of one place, (2 + 2 * len(ratios), 4) float32 around 0, in pixels."""
    sides = [(scale, scale), (math.sqrt(scale * next_scale),) * 2]
    for ratio in ratios:
        long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
        sides += [(long, short), (short, long)]
    half = torch.tensor(sides).clamp(max=1.0) * size / 2
    return torch.cat([-half, half], dim=1)


class SSDMatcher:
    """Positives are boxes of IoU >= threshold, and each ground truth's best box.

    Unlike in detectron2's Matcher with ``allow_low_quality_matches``, that best box belongs to this
    ground truth even if it overlaps another one more, and ties give one box. A box that is the best
    of several ground truths belongs to the last of them.
    """

    def __init__(self, threshold: float):
        """Set the threshold.

        Args:
            threshold: smallest IoU of a positive.
        """
        self.threshold = threshold

    def __call__(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """Match R default boxes with G ground truths; arguments are those of detectron2's Matcher.

        Args:
            iou: (G, R) float, between ground truth and default boxes.

        Returns:
            the ground truth of each box (R,) int64, and its label (R,) int8, 1 positive and 0
            negative.
        """
        if len(iou) == 0:
            matches = torch.zeros(iou.shape[1], dtype=torch.int64, device=iou.device)
            return matches, matches.to(torch.int8)
        best_iou, matches = iou.max(dim=0)
        # The maximum, as the order of several writes to one place is not defined.
        truths = torch.arange(len(iou), device=iou.device)
        owner = torch.full_like(matches, -1).scatter_reduce(0, iou.argmax(dim=1), truths, "amax")
        labels = (best_iou >= self.threshold) | (owner >= 0)
        return torch.where(owner >= 0, owner, matches), labels.to(torch.int8)
