"""IoU-balanced softmax cross-entropy (eq. 1 and 2), for detectors such as SSD."""

from torch import Tensor
from torch.nn import functional as F

from .weights import at_least_float32, iou_balanced_cls_weights


def iou_balanced_cross_entropy(
    logits: Tensor, labels: Tensor, iou: Tensor, *, eta: float = 1.5, group: Tensor | None = None
) -> Tensor:
    """Element-wise softmax cross-entropy whose positives are weighted by eq. 2.

    The result is element-wise, so that hard negatives can be mined from it. The loss of negatives
    is the plain one, so mining picks the negatives that it picks without the weights.

    Args:
        logits: (M, K + 1) float of any precision, background last.
        labels: (M,) int64 class index; K is background, -1 ignored (loss 0).
        iou: (P,) float, IoU of the positives' decoded boxes, in the order of their rows.
        eta: power >= 0 of eq. 2; 0 is plain cross-entropy.
        group: (P,) int64 or None, see :func:`iou_balanced_cls_weights`.

    Returns:
        (M,) float32 (float64 for float64 logits), the loss of each row.

    Raises:
        ValueError: if iou has not one entry for each positive, or eta is negative.
    """
    background = logits.shape[1] - 1
    logits = at_least_float32(logits)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    rows = ((labels >= 0) & (labels != background)).nonzero().squeeze(1)
    weights = iou_balanced_cls_weights(iou, loss.detach()[rows], eta=eta, group=group)
    return loss.index_put((rows,), loss[rows] * weights)
