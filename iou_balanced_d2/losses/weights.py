"""The weights of the IoU-balanced losses: constants for back-propagation, one function each.

Letters: P positives; ``iou`` is the IoU of a positive's *regressed* (decoded) box with its
matched ground-truth box.
"""

import torch
from torch import Tensor


def _check_rows(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one and the same shape (P,)."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape (P,), got {shapes}")


def check_power(name: str, value: float) -> None:
    """Raise ValueError unless ``value``, the power called ``name``, is finite and not negative.

    A negative power would make the weight *fall* with IoU, the opposite of the paper.
    """
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def sum_keeping_scale(balanced_sum: Tensor, plain_sum: Tensor) -> Tensor:
    """The factor of eq. 2 (and 5) that keeps the sum of the positives' loss.

    Args:
        balanced_sum: any shape, sum of iou^eta * loss over the positives of each group.
        plain_sum: same shape, sum of the loss over the same positives.

    Returns:
        plain_sum / balanced_sum; NaN where the denominator is 0 (or too small for a quotient
        with digits in it), which :func:`apply_cls_scale` turns into weights of 1.
    """
    scale = plain_sum / balanced_sum
    usable = (balanced_sum >= torch.finfo(balanced_sum.dtype).tiny) & torch.isfinite(scale)
    return torch.where(usable, scale, float("nan"))


def apply_cls_scale(powered_iou: Tensor, scale: Tensor) -> Tensor:
    """Eq. 2 from its parts: iou^eta * scale, and 1 where the scale does not exist (NaN)."""
    return torch.where(torch.isnan(scale), torch.ones_like(powered_iou), powered_iou * scale)


@torch.no_grad()
def iou_balanced_cls_weights(
    iou: Tensor, cls_loss: Tensor, *, eta: float, group: Tensor | None = None
) -> Tensor:
    """Weights of the positives' classification loss, eq. 2 of the paper.

    w_i = iou_i^eta * sum_j CE_j / sum_j(iou_j^eta * CE_j), so the positives' loss keeps its sum
    and moves to the well-placed boxes.

    Args:
        iou: (P,) float, IoU of the regressed boxes with their ground truth.
        cls_loss: (P,) float, the positives' plain classification loss ("CE": in RetinaNet the
            focal loss of the anchor's own class, alpha and gamma included).
        eta: power >= 0; 0 gives weights of 1, the plain loss. The paper's best: 1.5.
        group: (P,) int64 >= 0 or None. The sum is kept within each group, e.g. each pyramid
            level or each image; None is one group, the equation as written.

    Returns:
        (P,) float without gradient. Where a group's denominator is 0 (every box misses its
        ground truth, or no loss at all) its weights are 1.

    Raises:
        ValueError: if shapes differ or eta is negative.
    """
    check_power("eta", eta)
    _check_rows(iou=iou, cls_loss=cls_loss, **({} if group is None else {"group": group}))
    # In the loss's type: the scale of float64 losses can be beyond float32.
    powered = iou.to(cls_loss.dtype) ** eta
    if group is None:
        return apply_cls_scale(
            powered, sum_keeping_scale((powered * cls_loss).sum(), cls_loss.sum())
        )
    num_groups = int(group.max()) + 1 if len(group) else 0
    zeros = cls_loss.new_zeros(num_groups)
    balanced_sum = zeros.index_add(0, group, powered * cls_loss)
    plain_sum = zeros.index_add(0, group, cls_loss)
    return apply_cls_scale(powered, sum_keeping_scale(balanced_sum, plain_sum)[group])


@torch.no_grad()
def iou_balanced_loc_weights(iou: Tensor, *, lambda_: float, w_loc: float | Tensor = 1.0) -> Tensor:
    """Weights of the positives' localization loss, eq. 4 of the paper: w_loc * iou^lambda.

    Args:
        iou: (P,) float, IoU of the regressed boxes with their ground truth.
        lambda_: power >= 0; 0 weighs all positives alike. The paper's best: 1.5.
        w_loc: the constant that makes up for iou^lambda <= 1, see :func:`measure_w_loc`.

    Returns:
        (P,) float without gradient.

    Raises:
        ValueError: if lambda_ is negative.
    """
    check_power("lambda_", lambda_)
    return w_loc * iou**lambda_


@torch.no_grad()
def measure_w_loc(iou: Tensor, loc_loss: Tensor, *, lambda_: float) -> Tensor:
    """The w_loc that leaves the sum of the localization loss unchanged on these positives.

    sum(loc_loss) / sum(iou^lambda * loc_loss). The paper takes it at the first training step
    and keeps it; taken anew at every step it is eq. 5.

    Args:
        iou: (P,) float, IoU of the regressed boxes with their ground truth.
        loc_loss: (P,) float, the positives' plain localization loss, summed over coordinates.
        lambda_: power >= 0 of eq. 4.

    Returns:
        Scalar without gradient; 1 (the plain loss) where the denominator is 0.

    Raises:
        ValueError: if shapes differ or lambda_ is negative.
    """
    check_power("lambda_", lambda_)
    _check_rows(iou=iou, loc_loss=loc_loss)
    balanced_sum = (iou**lambda_ * loc_loss).sum()
    return sum_keeping_scale(balanced_sum, loc_loss.sum()).nan_to_num(nan=1.0)
