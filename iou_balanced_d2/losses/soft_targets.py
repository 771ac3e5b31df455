"""Rivals of eq. 2: sigmoid losses in which a positive's target is the IoU of its regressed box.

Sources: quality focal loss, Li et al., "Generalized Focal Loss", arXiv 2006.04388, eq. 6;
varifocal loss, Zhang et al., "VarifocalNet", arXiv 2008.13367, eq. 2.

For negatives both are a focal loss with target 0; only the P own terms of the positives differ.
"""

from torch import Tensor, where
from torch.nn import functional as F

from .focal import DenseLoss, OwnTerms, focal_targets, focal_terms


def _quality_focal_terms(logits: Tensor, iou: Tensor) -> OwnTerms:
    """|iou - p|^2 CE(p, iou) with p = sigmoid(logits): beta is 2."""
    p = logits.sigmoid()
    error = iou - p
    ce = F.binary_cross_entropy_with_logits(logits, iou, reduction="none")
    return OwnTerms(error**2 * ce, -error * (2 * p * (1 - p) * ce + error**2))


def _varifocal_terms(logits: Tensor, iou: Tensor) -> OwnTerms:
    """The IoU times CE(p, IoU); at IoU 0 a negative's term."""
    ce = F.binary_cross_entropy_with_logits(logits, iou, reduction="none")
    positive = OwnTerms(iou * ce, iou * (logits.sigmoid() - iou))
    negative = focal_terms(logits, factor=0.75, gamma=2.0)
    return OwnTerms(*(where(iou > 0, *pair) for pair in zip(positive, negative, strict=True)))


SOFT_TARGET_LOSSES = {
    "quality_focal": DenseLoss(1.0, 2.0, _quality_focal_terms),
    "varifocal": DenseLoss(0.75, 2.0, _varifocal_terms),
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
    return _sum("quality_focal", logits, labels, iou)


def varifocal_loss(logits: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
    """Sum of the varifocal loss (arXiv 2008.13367, eq. 2, alpha 0.75, gamma 2).

    Args and result are those of :func:`quality_focal_loss`.
    """
    return _sum("varifocal", logits, labels, iou)


def _sum(name: str, logits: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
    targets, loss = [focal_targets(labels, logits.shape[1])], SOFT_TARGET_LOSSES[name]
    return loss.sum([logits], targets, loss.own_terms([logits], targets, iou))
