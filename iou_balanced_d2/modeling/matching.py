"""Labelling anchors as detectron2's RetinaNet does, of many pairs block by block.

Letters: G ground-truth boxes of one image, R anchors of one image over all levels, B blocks of
R_b anchors. Boxes are XYXY in absolute coordinates; a block holds its anchors as columns,
(4, R_b), as operations run along them.
"""

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ..threads import CPU_BLOCK

# Anchors of a block: neighbours on one level, which overlap few boxes. A GPU needs larger blocks.
_CPU_ANCHORS, _GPU_ANCHORS = 1 << 10, 1 << 16
# Pairs of an anchor and a box at a time, which bounds the memory of a GPU.
_GPU_PAIRS = 1 << 24
# Up to so many pairs in an image the whole IoU (G, R) is computed faster than block by block. On a
# GPU it always is where it fits: each block costs some ten launches.
_FEW_PAIRS = 1 << 19


@torch.no_grad()
def label_anchors(
    anchors: list[Boxes], gt_instances: list[Instances], matcher: Matcher, num_classes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Label the anchors of a batch exactly as :meth:`detectron2.modeling.RetinaNet.label_anchors`.

    Args:
        anchors: L Boxes of R_l anchors, the same for every image.
        gt_instances: N Instances with ``gt_boxes`` and ``gt_classes``.
        matcher: the IoU thresholds and their labels, and whether each box also gets the anchors
            of its highest IoU ("low-quality matches"). One of another class than detectron2's gets
            the whole IoU (G, R), as from detectron2.
        num_classes: number of classes, K.

    Returns:
        N tensors (R,) int64: class index of each anchor, K for background, -1 for ignored; and N
        tensors (R, 4): the box matched to each anchor, of no meaning except at positives.
    """
    flat = Boxes.cat(anchors).tensor
    few_pairs = _FEW_PAIRS if flat.device.type == "cpu" else _GPU_PAIRS
    blocks = None
    gt_labels, gt_boxes = [], []
    for gt in gt_instances:
        boxes = gt.gt_boxes.tensor
        if len(boxes) == 0:
            gt_labels.append(torch.full((len(flat),), num_classes, device=flat.device))
            gt_boxes.append(torch.zeros_like(flat))
            continue
        if len(boxes) * len(flat) <= few_pairs or type(matcher) is not Matcher:
            match, label = matcher(pairwise_iou(gt.gt_boxes, Boxes(flat)))
        else:
            blocks = blocks or _blocks_of(anchors)
            match, label = _match(*blocks, boxes, matcher)
        classes = gt.gt_classes[match]
        classes[label == 0] = num_classes
        classes[label == -1] = -1
        gt_labels.append(classes)
        gt_boxes.append(boxes[match])
    return gt_labels, gt_boxes


def _blocks_of(anchors: list[Boxes]) -> tuple[list[Tensor], Tensor]:
    """B blocks of neighbouring anchors (4, R_b), and (B, 4) the smallest box around each."""
    size = _CPU_ANCHORS if anchors[0].device.type == "cpu" else _GPU_ANCHORS
    blocks = [b.T.contiguous() for level in anchors for b in level.tensor.split(size)]
    hulls = [torch.cat([b[:2].amin(dim=1), b[2:].amax(dim=1)]) for b in blocks]
    return blocks, torch.stack(hulls)


def _match(
    blocks: list[Tensor], hulls: Tensor, boxes: Tensor, matcher: Matcher
) -> tuple[Tensor, Tensor]:
    """Apply ``matcher`` to the IoU (G, R), computing only blocks of anchors that overlap a box.

    Args:
        blocks: B tensors (4, R_b), the anchors; see :func:`_blocks_of`.
        hulls: (B, 4), the smallest box around each block.
        boxes: (G, 4), G > 0.
        matcher: see :func:`label_anchors`.

    Returns:
        (R,) int64, the box of each anchor's highest IoU; (R,) int8, 1 for positive, 0 for
        background, -1 for ignored.
    """
    sizes = [block.shape[1] for block in blocks]
    best = boxes.new_zeros(sum(sizes))  # highest IoU of each anchor
    match = torch.zeros_like(best, dtype=torch.int64)
    best_of_box = boxes.new_zeros(len(blocks), len(boxes))  # highest IoU of a box in each block
    overlaps = (boxes[:, 2:] > hulls[:, None, :2]) & (boxes[:, :2] < hulls[:, None, 2:])
    pairs = CPU_BLOCK if boxes.device.type == "cpu" else _GPU_PAIRS
    near_boxes = _indices(overlaps.all(dim=2))
    results = zip(best.split(sizes), match.split(sizes), best_of_box, strict=True)
    # In one thread: two would spend their time waiting for Python's lock.
    for anchors, near, (block_best, block_match, highest) in zip(
        blocks, near_boxes, results, strict=True
    ):
        size = max(pairs // max(len(near), 1), 1)
        parts = zip(
            anchors.split(size, dim=1), block_best.split(size), block_match.split(size), strict=True
        )
        for part, part_best, part_match in parts if len(near) else ():
            iou = _pairwise_iou(boxes[near], part)
            torch.amax(iou, dim=0, out=part_best)
            # The first that is the highest. max() would give it, but starts threads for each call.
            last = len(near) - 1
            from_last = torch.arange(last, -1, -1, dtype=torch.int32, device=near.device)
            first = last - (iou == part_best).mul(from_last[:, None]).amax(dim=0)
            part_match.copy_(near[first.long()])
            highest[near] = torch.maximum(highest[near], iou.amax(dim=1))
    match.masked_fill_(best == 0, 0)  # the first of equal ones, as in detectron2
    label = matcher(best[None])[1]
    if matcher.allow_low_quality_matches:
        _label_best_anchors(label, blocks, boxes, best_of_box)
    return match, label


def _label_best_anchors(
    label: Tensor, blocks: list[Tensor], boxes: Tensor, best_of_box: Tensor
) -> None:
    """Set ``label`` (R,) to 1 where an anchor has the highest IoU of a box, ties included.

    Args:
        label: (R,) int8.
        blocks: B tensors (4, R_b), the anchors.
        boxes: (G, 4).
        best_of_box: (B, G), the highest IoU of each box in each block.
    """
    highest = best_of_box.amax(dim=0)
    # A box that overlaps no anchor has IoU 0 with all of them, so all are its best.
    label.masked_fill_((highest == 0).any(), 1)
    has_highest = _indices((best_of_box == highest) & (highest > 0))
    labels = label.split([block.shape[1] for block in blocks])
    for anchors, here, block_label in zip(blocks, has_highest, labels, strict=True):
        if len(here):
            iou = _pairwise_iou(boxes[here], anchors)
            block_label.masked_fill_((iou == highest[here, None]).any(dim=0), 1)


def _pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU (G, R_b) of boxes (G, 4) and anchors (4, R_b), bit by bit detectron2's."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)
    left, top, right, bottom = anchors
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
    height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
    intersection = width.mul_(height)
    areas = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top)
    iou = intersection.div_(areas.sub_(intersection))
    return iou.nan_to_num_(nan=0.0)  # two boxes without area


def _indices(mask: Tensor) -> list[Tensor]:
    """Indices (int64) of the true entries of each row of a mask; one wait for the device."""
    counts = mask.sum(dim=1).tolist()
    return list(mask.nonzero()[:, 1].split(counts))
