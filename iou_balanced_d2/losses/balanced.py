"""The losses of eq. 1 to 4 on softmax scores, for detectors such as SSD, and on box deltas."""

from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

from .weights import at_least_float32, iou_balanced_cls_weights, iou_balanced_loc_weights


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


def iou_balanced_smooth_l1_loss(
    pred: Tensor,
    target: Tensor,
    iou: Tensor,
    *,
    beta: float = 0.11,
    lambda_: float = 1.5,
    w_loc: float | Tensor = 1.0,
) -> Tensor:
    """Sum over positives and coordinates of w_i * smoothL1(pred - target), eq. 3 with eq. 4.

    Args:
        pred: (P, 4) float, predicted deltas (dx, dy, dw, dh) of the positives.
        target: (P, 4) float, the deltas of their ground truth.
        iou: (P,) float, IoU of the decoded boxes with their ground truth; gets no gradient.
        beta: knee between the quadratic and the linear part, >= 0 (the paper's delta, 0.11 in
            the author's code).
        lambda_: power >= 0 of eq. 4; 0 is the plain loss times w_loc.
        w_loc: constant of eq. 4, see :func:`measure_w_loc`.

    Returns:
        Scalar sum, float32 (float64 for float64 deltas), not yet divided by the number of
        positives.

    Raises:
        ValueError: if shapes do not fit or lambda_ is negative.
    """
    if pred.shape != target.shape or pred.shape != (len(iou), 4):
        raise ValueError(
            f"expected pred and target of shape (P, 4) and iou (P,), got {tuple(pred.shape)}, "
            f"{tuple(target.shape)} and {tuple(iou.shape)}"
        )
    pred, target, iou = map(at_least_float32, (pred, target, iou))
    weights = iou_balanced_loc_weights(iou, lambda_=lambda_, w_loc=w_loc)
    return (smooth_l1_loss(pred, target, beta=beta, reduction="none").sum(dim=1) * weights).sum()
