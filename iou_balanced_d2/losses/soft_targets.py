"""Rivals of eq. 2: sigmoid losses in which a positive's target is the IoU of its regressed box.

Sources: quality focal loss, Li et al., "Generalized Focal Loss", arXiv 2006.04388, eq. 6;
varifocal loss, Zhang et al., "VarifocalNet", arXiv 2008.13367, eq. 2.

For negatives both are a focal loss with target 0. Their sum is :func:`.focal.weighted_focal_sum`
with weights 0 at the positives; only P terms differ.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .focal import FocalTargets, focal_targets, weighted_focal_sum


def _cross_entropy(logits: Tensor, iou: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, iou, reduction="none")


def _quality_focal_terms(logits: Tensor, iou: Tensor) -> Tensor:
    """|iou - p|^2 CE(p, iou) with p = sigmoid(logits): beta is 2."""
    return (iou - logits.sigmoid()) ** 2 * _cross_entropy(logits, iou)


def _varifocal_terms(logits: Tensor, iou: Tensor) -> Tensor:
    """The IoU times CE(p, iou); at IoU 0 a negative's 0.75 p^2 CE(p, 0), so gamma is 2."""
    factor = torch.where(iou > 0, iou, 0.75 * logits.sigmoid() ** 2)
    return factor * _cross_entropy(logits, iou)


class SoftTargetLoss(NamedTuple):
    """A loss of this module.

    Attributes:
        positive_terms: (P,) logits and (P,) IoUs to (P,) terms, with gradient for the logits.
        alpha: of the focal loss that gives the negatives' terms, (1 - alpha) p^gamma CE(p, 0).
        gamma: of the same focal loss.
    """

    positive_terms: Callable[[Tensor, Tensor], Tensor]
    alpha: float
    gamma: float

    def sum(self, logits: Tensor, targets: FocalTargets, iou: Tensor) -> Tensor:
        """Sum over all logits.

        Args:
            logits: (M, K) float of any precision; the arithmetic is float32 (or float64).
            targets: positives and ignored rows of these logits.
            iou: (P,) float without gradient, in [0, 1].

        Returns:
            scalar, float32 (float64 for float64 logits).
        """
        background = weighted_focal_sum(
            logits, targets, torch.zeros_like(iou), alpha=self.alpha, gamma=self.gamma
        )
        positive = logits[targets.rows, targets.classes].to(background.dtype)
        return background + self.positive_terms(positive, iou.to(background.dtype)).sum()


SOFT_TARGET_LOSSES = {
    "quality_focal": SoftTargetLoss(_quality_focal_terms, alpha=0.0, gamma=2.0),
    "varifocal": SoftTargetLoss(_varifocal_terms, alpha=0.25, gamma=2.0),
}


def quality_focal_loss(logits: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
    """Sum of the quality focal loss (arXiv 2006.04388, eq. 6, beta 2).

    Args:
        logits: (M, K) float.
        labels: (M,) int64 class index; K is background, -1 ignored.
        iou: (P,) float, IoU of the positives' decoded boxes, in the order of their rows: the
            targets of their scores. No gradient.

    Returns:
        Scalar sum, not yet divided by the number of positives.
    """
    targets = focal_targets(labels, logits.shape[1])
    return SOFT_TARGET_LOSSES["quality_focal"].sum(logits, targets, iou.detach())


def varifocal_loss(logits: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
    """Sum of the varifocal loss (arXiv 2008.13367, eq. 2, alpha 0.75, gamma 2).

    Args:
        logits: (M, K) float.
        labels: (M,) int64 class index; K is background, -1 ignored.
        iou: (P,) float, IoU of the positives' decoded boxes, in the order of their rows: the
            targets of their scores. No gradient.

    Returns:
        Scalar sum, not yet divided by the number of positives.
    """
    targets = focal_targets(labels, logits.shape[1])
    return SOFT_TARGET_LOSSES["varifocal"].sum(logits, targets, iou.detach())
