"""SSD's losses, plain and IoU-balanced: softmax cross-entropy with hard negatives, smooth L1.

Letters: N images, R default boxes of one image over all feature maps, K classes, P positives,
L feature maps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iou_balanced_d2.losses.focal import OwnTerms
from iou_balanced_d2.modeling import IoUBalancedLoss
from iou_balanced_d2.modeling.positives import Positives


@torch.no_grad()
def hard_negatives(loss: Tensor, labels: Tensor, num_classes: int, ratio: float) -> Tensor:
    """The negatives of each image with the largest loss, ``ratio`` for each of its positives.

    The element-wise loss and the labels, K for background and -1 for ignored, are (N, R), and so is
    what is returned (bool).
    """
    is_negative = labels == num_classes
    num_positives = ((labels >= 0) & ~is_negative).sum(dim=1, keepdim=True)
    order = loss.masked_fill(~is_negative, -float("inf")).argsort(dim=1, descending=True)
    is_hard = torch.arange(loss.shape[1], device=loss.device) < ratio * num_positives
    return torch.zeros_like(is_negative).scatter(1, order, is_hard) & is_negative


class SSDLoss(IoUBalancedLoss):
    """:class:`IoUBalancedLoss` on softmax scores: (N, R_l, K + 1) logits, background last.

    "CE" of eq. 1 and 2 is the softmax cross-entropy. The hard negatives are chosen after the
    positives are weighted; they are those of plain SSD.
    """

    num_background_scores = 1

    def __init__(self, *, neg_pos_ratio: float = 3.0, **iou_balanced: Any):
        """Set the hyper-parameters.

        Args:
            neg_pos_ratio: hard negatives of an image for each of its positives.
            iou_balanced: the arguments of :class:`IoUBalancedLoss`.
        """
        super().__init__(**iou_balanced)
        self.neg_pos_ratio = neg_pos_ratio

    def _own_terms(self, flat_logits: list[Tensor], positives: Positives, iou: Tensor) -> OwnTerms:
        """CE_i of eq. 2 for the P positives; derivatives are by CE_i, 1 before weighting."""
        with torch.no_grad():
            loss = torch.cat(
                [
                    F.cross_entropy(logits[t.rows].float(), t.classes, reduction="none")
                    for logits, t in zip(flat_logits, positives.targets, strict=True)
                ]
            )
        return OwnTerms(loss, torch.ones_like(loss))

    def _cls_loss(self, flat_logits: list[Tensor], positives: Positives, own: OwnTerms) -> Tensor:
        """Eq. 1 over the positives, weighted, and the hard negatives of each image."""
        num_images = len(positives.blocks[0])
        weights = own.grad.split(positives.per_level)
        losses, labels = [], []
        for logits, (rows, classes, ignored), level_weights in zip(
            flat_logits, positives.targets, weights, strict=True
        ):
            level_labels = rows.new_full((len(logits),), self.num_classes)
            level_labels[rows], level_labels[ignored] = classes, -1
            loss = F.cross_entropy(logits.float(), level_labels, ignore_index=-1, reduction="none")
            loss = loss.index_put((rows,), loss[rows] * level_weights)
            losses.append(loss.view(num_images, -1))
            labels.append(level_labels.view(num_images, -1))
        loss, label = torch.cat(losses, 1), torch.cat(labels, 1)
        is_positive = (label >= 0) & (label != self.num_classes)
        counts = is_positive | hard_negatives(loss, label, self.num_classes, self.neg_pos_ratio)
        return torch.where(counts, loss, 0.0).sum()
