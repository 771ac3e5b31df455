"""Labelling the points of FCOS as detectron2 does, block by block.

Letters: G ground-truth boxes of one image, R points of one image over all levels. A point is a
square box (XYXY) around it, whose side is the stride of its level.
"""

from collections.abc import Callable, Iterator

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from iou_balanced_d2.threads import run_in_threads

_CPU_POINTS, _GPU_POINTS = 1 << 8, 1 << 14
Match = Callable[[Boxes, list[Boxes]], Tensor]


@torch.no_grad()
def label_points(
    match: Match,
    radius: float,
    anchors: list[Boxes],
    gt_instances: list[Instances],
    num_classes: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Label the points of a batch exactly as detectron2's ``FCOS.label_anchors``.

    Each block of neighbouring points meets only the boxes whose centers lie near it.

    Args:
        match: ``FCOS._match_anchors`` of detectron2: the quality (G, R) of each match, 0 for none.
        radius: around a box's center, in strides, in which points can match.
        anchors: L Boxes of R_l points, the same for every image.
        gt_instances: N Instances with ``gt_boxes`` and ``gt_classes``.
        num_classes: number of classes, K.

    Returns:
        N tensors (R,) int64: class index of each point, K for background; and N tensors (R, 4): the
        box matched to each point, of no meaning except at positives.
    """
    flat = Boxes.cat(anchors).tensor
    gt_labels, gt_boxes = [], []
    for gt in gt_instances:
        quality = flat.new_zeros(len(flat))
        index = torch.zeros_like(quality, dtype=torch.int64)
        if len(gt):
            _match_blocks(match, radius, anchors, gt.gt_boxes, quality, index)
            background = quality < 1e-5  # detectron2's number
            gt_labels.append(gt.gt_classes[index].masked_fill(background, num_classes))
            gt_boxes.append(gt.gt_boxes.tensor[index])
        else:
            gt_labels.append(torch.full_like(index, num_classes))
            gt_boxes.append(torch.zeros_like(flat))
    return gt_labels, gt_boxes


def _match_blocks(
    match: Match, radius: float, anchors: list[Boxes], gt: Boxes, quality: Tensor, index: Tensor
) -> None:
    """Fill in the best quality (R,) of each point and the box (R,) that has it."""
    on_cpu = quality.device.type == "cpu"
    size = _CPU_POINTS if on_cpu else _GPU_POINTS
    sizes = [len(level) for level in anchors]
    centers = gt.get_centers()
    per_level = ([x.tensor for x in anchors], quality.split(sizes), index.split(sizes))
    jobs = [
        (level, *block)
        for level, tensors in enumerate(zip(*per_level, strict=True))
        for block in zip(*(x.split(size) for x in tensors), strict=True)
    ]

    def work(shared: Iterator[tuple[int, Tensor, Tensor, Tensor]]) -> None:
        for level, points, block_quality, block_index in shared:
            reach = radius * (points[0, 2] - points[0, 0]) + 1
            inside = (centers > points[:, :2].amin(0) - reach) & (
                centers < points[:, 2:].amax(0) + reach
            )
            near = inside.all(dim=1).nonzero().squeeze(1)
            if not len(near):
                continue
            # The first and the last level have bounds of their own; a point before and one after
            # keep the block on its own level.
            first, last = level == 0, level == len(anchors) - 1
            levels = [points[:1]] * (not first) + [points] + [points[:1]] * (not last)
            found = match(gt[near], [Boxes(x) for x in levels])
            found = found[:, (not first) : (not first) + len(points)]
            values, best = found.max(dim=0)
            block_quality.copy_(values)
            block_index.copy_(near[best])

    run_in_threads(work, jobs, torch.get_num_threads() if on_cpu else 1)
