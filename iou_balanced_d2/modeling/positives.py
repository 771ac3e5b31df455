"""Find the positives of a batch once, as indices; later all tensors of boxes have P rows."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.focal import FocalTargets


class Positives(NamedTuple):
    """The P positives of a batch, ordered by level, then image, then anchor."""

    #: L entries, the positives and ignored rows of each level's (N * R_l, K) logits.
    targets: list[FocalTargets]
    image: Tensor  #: (P,) int64, image of each positive
    blocks: list[list[int]]  #: L x N numbers of positives on the host, ``blocks[level][image]``

    @property
    def num(self) -> int:
        """P, without waiting for the device."""
        return sum(self.per_level)

    @property
    def per_level(self) -> list[int]:
        """Number of positives on each of the L levels."""
        return [sum(block) for block in self.blocks]

    @property
    def level(self) -> Tensor:
        """Pyramid level of each positive, (P,) int64."""
        return torch.cat([torch.full_like(t.rows, i) for i, t in enumerate(self.targets)])


def find_positives(gt_labels: list[Tensor], level_sizes: list[int], num_classes: int) -> Positives:
    """Index the positive and the ignored anchors of a batch.

    Args:
        gt_labels: N >= 0 tensors (R,) int64, class index of each anchor; ``num_classes`` is
            background, -1 ignored.
        level_sizes: L numbers of anchors, summing to R.
        num_classes: number of classes, K.

    Returns:
        the positives. The host waits twice for the device: to index and to count them.

    Raises:
        ValueError: if a label is above K; a GPU would end the process without naming the cause.
    """
    num_images, num_levels = len(gt_labels), len(level_sizes)
    no_labels = torch.zeros(0, sum(level_sizes), dtype=torch.int64)
    labels = torch.stack(gt_labels) if gt_labels else no_labels
    # Almost all anchors are background: they are passed over once.
    image, anchor = (labels != num_classes).nonzero().unbind(dim=1)
    label = labels[image, anchor]
    bounds = torch.tensor([0, *itertools.accumulate(level_sizes)], device=labels.device)
    level = torch.bucketize(anchor, bounds[1:], right=True)
    start, size = bounds[level], bounds.diff()[level]
    is_ignored = (label < 0).long()
    row = image * size + anchor - start
    # Positives first, both level by level.
    order = (is_ignored * labels.numel() + num_images * start + row).argsort()
    block = (is_ignored * num_levels + level) * num_images + image
    number = torch.zeros(2 * num_levels * num_images, dtype=torch.int64, device=labels.device)
    number.index_add_(0, block, torch.ones_like(block))
    highest = label.max() if len(label) else num_classes * label.new_ones(())
    *counts, highest = torch.cat([number, highest[None]]).tolist()
    if highest > num_classes:
        raise ValueError(
            f"label {highest} in the ground truth, but the detector's NUM_CLASSES (such as "
            f"MODEL.RETINANET.NUM_CLASSES) is {num_classes}"
        )
    blocks = [counts[i * num_images :][:num_images] for i in range(2 * num_levels)]
    sizes = [sum(numbers) for numbers in blocks]
    rows, classes = (x[order].split(sizes) for x in (row, label))
    targets = map(FocalTargets, rows[:num_levels], classes, rows[num_levels:])
    num_positives = sum(sizes[:num_levels])
    return Positives(list(targets), image[order[:num_positives]], blocks[:num_levels])


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

    It goes image by image, as stacking would copy all N * R boxes.
    """
    boxes, start = [], 0
    for size, target, counts in zip(level_sizes, positives.targets, positives.blocks, strict=True):
        for i, rows in enumerate(target.rows.split(counts)):
            boxes.append(gt_boxes[i][rows + (start - i * size)])
        start += size
    return torch.cat(boxes) if boxes else positives.image.new_zeros(0, 4, dtype=torch.float32)
