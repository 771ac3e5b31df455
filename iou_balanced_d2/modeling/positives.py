"""Finding the positives of a batch once, as indices: everything about boxes has P rows after it."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.focal import FocalTargets


class Positives(NamedTuple):
    """The P positives of a batch, ordered by level, then image, then anchor.

    Attributes:
        targets: L entries, the positives and ignored rows of each level's (N * R_l, K) logits.
        level: (P,) int64, pyramid level of each positive.
        image: (P,) int64, image of each positive.
        blocks: L x N numbers of positives on the host, ``blocks[level][image]``.
    """

    targets: list[FocalTargets]
    level: Tensor
    image: Tensor
    blocks: list[list[int]]

    @property
    def num(self) -> int:
        """P, known without asking the device."""
        return sum(map(sum, self.blocks))

    @property
    def per_level(self) -> list[int]:
        """Number of positives on each of the L levels."""
        return [sum(block) for block in self.blocks]


def find_positives(gt_labels: list[Tensor], level_sizes: list[int], num_classes: int) -> Positives:
    """Index the positive and the ignored anchors of a batch.

    Args:
        gt_labels: N tensors (R,) int64, class index of each anchor; ``num_classes`` is
            background, -1 ignored.
        level_sizes: L numbers of anchors, summing to R.
        num_classes: K.

    Returns:
        the positives; reading their number is the one time the host waits for the device.
    """
    labels = torch.stack(gt_labels)  # (N, R)
    is_positive = (labels >= 0) & (labels != num_classes)
    blocks = torch.stack([x.sum(dim=1) for x in is_positive.split(level_sizes, dim=1)]).tolist()
    targets, images = [], []
    for level_labels, positive in zip(
        labels.split(level_sizes, dim=1), is_positive.split(level_sizes, dim=1), strict=True
    ):
        image, anchor = positive.nonzero(as_tuple=True)
        ignored_image, ignored_anchor = (level_labels < 0).nonzero(as_tuple=True)
        size = level_labels.shape[1]
        rows, ignored = image * size + anchor, ignored_image * size + ignored_anchor
        targets.append(FocalTargets(rows, level_labels[image, anchor], ignored))
        images.append(image)
    level = torch.cat([torch.full_like(image, i) for i, image in enumerate(images)])
    return Positives(targets, level, torch.cat(images), blocks)


def gather_rows(levels: list[Tensor], positives: Positives) -> Tensor:
    """Pick the positives' rows out of per-level predictions.

    Args:
        levels: L tensors (N, R_l, C).
        positives: P positives of these levels.

    Returns:
        (P, C), with gradient.
    """
    rows = [
        x.reshape(-1, x.shape[-1])[t.rows] for x, t in zip(levels, positives.targets, strict=True)
    ]
    return torch.cat(rows)


def gather_anchors(anchors: list[Tensor], positives: Positives) -> Tensor:
    """Pick the positives' anchors (P, 4) out of L tensors (R_l, 4), the same for every image."""
    rows = [
        x[t.rows - image * len(x)]
        for x, t, image in zip(
            anchors, positives.targets, positives.image.split(positives.per_level), strict=True
        )
    ]
    return torch.cat(rows)


def gather_gt_boxes(gt_boxes: list[Tensor], level_sizes: list[int], positives: Positives) -> Tensor:
    """Pick the positives' ground truth (P, 4) out of N tensors (R, 4), one box for each anchor.

    Image by image, as stacking them would copy all N * R boxes.
    """
    boxes, start = [], 0
    for size, target, counts in zip(level_sizes, positives.targets, positives.blocks, strict=True):
        for i, rows in enumerate(target.rows.split(counts)):
            boxes.append(gt_boxes[i][rows + (start - i * size)])
        start += size
    return torch.cat(boxes)
