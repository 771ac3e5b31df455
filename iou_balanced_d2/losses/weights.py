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


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError, which names ``name``, unless ``value`` is a finite number >= 0.

    A negative power would make the weight *fall* with IoU, the opposite of the paper.
    """
    if not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers; sums in half precision overflow, or stand still from 256 terms on."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _powered(iou: Tensor, name: str, power: float) -> Tensor:
    """iou^power of eq. 2 and 4, of any shape; an error calls the power ``name``."""
    check_not_negative(name, power)
    return iou**power


@torch.no_grad()
def plain_and_balanced_sums(
    iou: Tensor,
    loss: Tensor,
    *,
    power: float,
    group: Tensor | None = None,
    num_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The two sums of eq. 2, 4 and 5 over (P,): sum(loss) and sum(iou^power * loss).

    They are scalars, or (G,) for G groups, ``group`` being (P,) int64 from 0 to G - 1; to find G,
    where it is None, the host waits for the device.
    """
    _check_rows(iou=iou, loss=loss, **({} if group is None else {"group": group}))
    iou, loss = at_least_float32(iou), at_least_float32(loss)
    balanced = _powered(iou, "power", power) * loss
    if group is None:
        return loss.sum(), balanced.sum()
    # A GPU adds in any order; after float64 that hardly ever shows in float32.
    if num_groups is None:
        num_groups = int(group.max()) + 1 if len(group) else 0
    zeros = loss.new_zeros(num_groups, dtype=torch.float64)
    plain, balanced = (zeros.index_add(0, group, x.double()) for x in (loss, balanced))
    return plain.to(loss.dtype), balanced.to(loss.dtype)


def _sum_keeping_scale(plain_sum: Tensor, balanced_sum: Tensor) -> Tensor:
    """plain_sum / balanced_sum; NaN where that is 0 (or too small for an accurate quotient)."""
    scale = plain_sum / balanced_sum
    usable = (balanced_sum >= torch.finfo(balanced_sum.dtype).tiny) & torch.isfinite(scale)
    return torch.where(usable, scale, float("nan"))


@torch.no_grad()
def iou_balanced_cls_weights(
    iou: Tensor,
    cls_loss: Tensor,
    *,
    eta: float,
    group: Tensor | None = None,
    num_groups: int | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
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
        num_groups: number of groups, above the largest of ``group``; None finds it, for which the
            host waits for the device.
        sums: scalars, the two sums of eq. 2 (:func:`plain_and_balanced_sums`) over more positives
            than these, such as those of all processes; None takes them over these.

    Returns:
        (P,) float without gradient, float32 for a loss in half precision. Where a group's
        denominator is 0 (every box misses its ground truth, or no loss at all) its weights are 1.

    Raises:
        ValueError: if shapes differ or eta is negative.
    """
    # In the loss's type: the scale of float64 losses can be beyond float32, and inf * 0 is NaN.
    cls_loss = at_least_float32(cls_loss)
    iou = iou.to(cls_loss.dtype)
    powered = _powered(iou, "eta", eta)
    if sums is None:
        sums = plain_and_balanced_sums(iou, cls_loss, power=eta, group=group, num_groups=num_groups)
    scale = _sum_keeping_scale(sums[0].to(powered.dtype), sums[1].to(powered.dtype))
    if group is not None:
        scale = scale[group]
    return torch.where(torch.isnan(scale), torch.ones_like(powered), powered * scale)


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
    return w_loc * _powered(iou, "lambda_", lambda_)


@torch.no_grad()
def measure_w_loc(iou: Tensor, loc_loss: Tensor, *, lambda_: float) -> Tensor:
    """The w_loc that leaves the sum of the localization loss unchanged on these positives.

    w_loc = sum(loc_loss) / sum(iou^lambda * loc_loss). The paper measures it at the first training
    step and keeps it; measured at each step, it is eq. 5.

    Args:
        iou: (P,) float, IoU of the regressed boxes with their ground truth.
        loc_loss: (P,) float, the positives' plain localization loss, summed over coordinates.
        lambda_: power >= 0 of eq. 4.

    Returns:
        Scalar without gradient; 1 (the plain loss) where the denominator is 0.

    Raises:
        ValueError: if shapes differ or lambda_ is negative.
    """
    check_not_negative("lambda_", lambda_)
    sums = plain_and_balanced_sums(iou, loc_loss, power=lambda_)
    return _sum_keeping_scale(*sums).nan_to_num(nan=1.0)
