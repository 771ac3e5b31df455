"""Find the positives of a batch once, as indices; later all tensors of boxes have P rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.focal import FocalTargets


class Positives(NamedTuple):
    """The P positives of a batch, ordered by level, then image, then anchor.

    Attributes:
        targets: L entries, the positives and ignored rows of each level's (N * R_l, K) logits.
        image: (P,) int64, image of each positive.
        blocks: L x N numbers of positives on the host, ``blocks[level][image]``.
    """

    targets: list[FocalTargets]
    image: Tensor
    blocks: list[list[int]]

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
        the positives. The host waits once for the device, to count and index them.

    Raises:
        ValueError: if a label is above K; a GPU would end the process without naming the cause.
    """
    num_images = len(gt_labels)
    no_labels = torch.zeros(0, sum(level_sizes), dtype=torch.int64)
    stacked = torch.stack(gt_labels) if gt_labels else no_labels
    levels = stacked.split(level_sizes, dim=1)  # L of (N, R_l)
    labels = torch.cat([x.reshape(-1) for x in levels])  # level by level, (N * R,)
    is_positive, is_ignored = (labels >= 0) & (labels != num_classes), labels < 0
    level_rows = [num_images * size for size in level_sizes]
    blocks = (
        torch.stack(
            [
                x.view(num_images, size).sum(dim=1)
                for x, size in zip(mask.split(level_rows), level_sizes, strict=True)
            ]
        )
        for mask in (is_positive, is_ignored)
    )
    counted = torch.stack([*blocks])  # (2, L, N)
    highest_label = labels.max() if len(labels) else labels.new_zeros(())
    *flat, highest = torch.cat([counted.flatten(), highest_label[None]]).tolist()
    if highest > num_classes:
        raise ValueError(
            f"label {highest} in the ground truth, but the detector's NUM_CLASSES (such as "
            f"MODEL.RETINANET.NUM_CLASSES) is {num_classes}"
        )
    counts = torch.tensor(flat, dtype=torch.int64).view(counted.shape).tolist()
    positive, ignored = (
        mask.nonzero().squeeze(1).split([sum(block) for block in blocks])
        for mask, blocks in zip((is_positive, is_ignored), counts, strict=True)
    )
    targets, images, start = [], [], 0
    for size, num_rows, p, i in zip(level_sizes, level_rows, positive, ignored, strict=True):
        targets.append(FocalTargets(p - start, labels[p], i - start))
        images.append((p - start) // max(size, 1))
        start += num_rows
    return Positives(targets, torch.cat(images), counts[0])


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
