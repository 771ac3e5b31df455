"""Sigmoid focal loss from class indices, with a weight for each positive (eq. 1 and 2).

Shapes: logits (M, K) for M anchors and K classes; P positives among them.

Almost every one of the M * K logits is a negative. So the sum is taken as
*background term of all logits* + *sparse correction at the positives and the ignored anchors*:
no one-hot target, no masked copy, and loss and gradient come out of the same pass.
"""

import functools
import logging
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .weights import iou_balanced_cls_weights

# Elements of one block on the CPU: its few temporaries of 4 bytes an element stay in a core's
# cache, while a block is still long enough to hide the cost of calling an operator. Elsewhere
# blocks only bound the memory of temporaries.
_CPU_BLOCK, _BLOCK = 1 << 16, 1 << 24
# log1p(exp(x)) equals x to the last bit of float64 above this, and exp(50) is far from overflow.
_SOFTPLUS_THRESHOLD = 50.0

logger = logging.getLogger(__name__)


class FocalTargets(NamedTuple):
    """Where the logits (M, K) of one level are not plain background.

    Attributes:
        rows: (P,) int64, row of each positive.
        classes: (P,) int64, its class in [0, K).
        ignored: (I,) int64, rows that take no part in the loss.
    """

    rows: Tensor
    classes: Tensor
    ignored: Tensor


def focal_targets(labels: Tensor, num_classes: int) -> FocalTargets:
    """Read labels (M,) int64 (class index; K = background, -1 = ignored) into index form."""
    rows = ((labels >= 0) & (labels != num_classes)).nonzero().squeeze(1)
    return FocalTargets(rows, labels[rows], (labels < 0).nonzero().squeeze(1))


def _background_terms(x: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of logits x (any shape) towards target 0, and its derivative.

    With p = sigmoid(x) and s = -log(1 - p): (1 - alpha) p^gamma s, whose derivative is
    (1 - alpha) p^gamma (gamma (1 - p) s + p).
    """
    p = torch.sigmoid(x)
    s = F.softplus(x, threshold=_SOFTPLUS_THRESHOLD)
    modulator = (p * p if gamma == 2 else p**gamma).mul_(1 - alpha)
    grad = torch.addcmul(s, s, p, value=-1).mul_(gamma).add_(p).mul_(modulator)
    return modulator.mul_(s), grad


def _positive_terms(x: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of logits x (P,) towards target 1, and its derivative.

    The mirror of the background: target 1 at x is target 0 at -x, with alpha for 1 - alpha.
    """
    loss, grad = _background_terms(-x, 1 - alpha, gamma)
    return loss, -grad


def _compute_dtype(logits: Tensor) -> torch.dtype:
    """Arithmetic is in float32, also for half-precision logits; float64 stays as it is."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.no_grad()
def positive_focal_loss(
    logits: Tensor, targets: FocalTargets, *, alpha: float, gamma: float
) -> Tensor:
    """The positives' own focal terms, CE_i of eq. 2, without gradient.

    Args:
        logits: (M, K) float.
        targets: the positives of these logits.
        alpha: weight of the positives in the focal loss; 1 - alpha of the negatives.
        gamma: focusing power >= 0.

    Returns:
        (P,) float32 (float64 for float64 logits).
    """
    x = logits[targets.rows, targets.classes].to(_compute_dtype(logits))
    return _positive_terms(x, alpha, gamma)[0]


def _background_sum(logits: Tensor, alpha: float, gamma: float, grad: Tensor | None) -> Tensor:
    """Sum of the background terms of all logits; their derivative goes to ``grad`` in passing."""
    dtype = _compute_dtype(logits)
    flat = logits.reshape(-1)
    size = _CPU_BLOCK if logits.device.type == "cpu" else _BLOCK
    sums = []
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        loss, block_grad = _background_terms(block.to(dtype), alpha, gamma)
        sums.append(loss.sum())
        if grad is not None:
            grad.view(-1)[start : start + size].copy_(block_grad)
    # Summed in float64: with 10^7 and more small terms the order of blocks must not show.
    return torch.stack(sums).double().sum() if sums else flat.new_zeros((), dtype=torch.float64)


def _focal_sum(
    logits: Tensor, targets: FocalTargets, weights: Tensor, alpha: float, gamma: float, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss sum and, if asked for, its derivative with respect to logits (M, K)."""
    dtype = _compute_dtype(logits)
    rows, classes, ignored = targets
    # Not float16: unscaled gradients would underflow there.
    out_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    out = torch.empty(logits.shape, dtype=out_dtype, device=logits.device) if grad else None
    total = _background_sum(logits, alpha, gamma, out)

    x = logits[rows, classes].to(dtype)
    loss, loss_grad = _positive_terms(x, alpha, gamma)
    total += (weights * loss).sum() - _background_terms(x, alpha, gamma)[0].sum()
    total -= _background_terms(logits[ignored].to(dtype), alpha, gamma)[0].sum()
    if out is not None:
        out[rows, classes] = (weights * loss_grad).to(out.dtype)
        out[ignored] = 0
    return total.to(dtype), out


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The fused kernels of :mod:`.focal_triton`, or None where they do not run.

    Tried once on the GPU in use: a Triton without a compiler, or an unknown GPU, must not end a
    training that torch can do.
    """
    try:
        from . import focal_triton

        row = torch.zeros(1, dtype=torch.int64, device="cuda")
        focal_triton.focal_sum(row[:, None].float(), row, row, row[:0], row.float(), 0.25, 2.0)
    except Exception as error:  # whatever a compiler and its driver may raise
        logger.warning(f"Focal loss without Triton, in plain torch: {error!r}")
        return None
    return focal_triton


def _kernels_for(logits: Tensor) -> ModuleType | None:
    if logits.is_cuda and logits.dtype != torch.float64:
        return _triton_kernels()
    return None


class _WeightedFocalSum(torch.autograd.Function):
    """The scalar loss of :func:`weighted_focal_sum`.

    On the CPU, where the arithmetic costs most, the forward pass makes the gradient too. On a GPU,
    where memory traffic does, the backward pass computes it from the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: FocalTargets,
        weights: Tensor,
        alpha: float,
        gamma: float,
    ) -> Tensor:
        logits = logits.contiguous()
        ctx.save_for_backward(logits, weights, *targets)
        ctx.hyper, ctx.grad = (alpha, gamma), None
        if kernels := _kernels_for(logits):
            return kernels.focal_sum(logits, *targets, weights, alpha, gamma)
        total, ctx.grad = _focal_sum(
            logits, targets, weights, alpha, gamma, grad=ctx.needs_input_grad[0]
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, weights, *saved = ctx.saved_tensors
        targets, (alpha, gamma) = FocalTargets(*saved), ctx.hyper
        # The gradient is handed over, scaled in place: no second tensor of the logits' size.
        # Only a second backward through a retained graph has to compute it again.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            if kernels := _kernels_for(logits):
                args = (logits, *targets, weights, alpha, gamma, grad_output)
                return kernels.focal_grad(*args), None, None, None, None
            grad = _focal_sum(logits, targets, weights, alpha, gamma, grad=True)[1]
            assert grad is not None
        return grad.mul_(grad_output).to(logits.dtype), None, None, None, None


def weighted_focal_sum(
    logits: Tensor, targets: FocalTargets, weights: Tensor, *, alpha: float, gamma: float
) -> Tensor:
    """Sum of the sigmoid focal loss with a constant weight for each positive, eq. 1.

    Only the entry of a positive's own class is weighted; its other K - 1 entries are negatives
    of weight 1, as in the author's code.

    Args:
        logits: (M, K) float of any precision; the arithmetic is float32 (or float64).
        targets: positives and ignored rows of these logits.
        weights: (P,) float without gradient, in the order of ``targets.rows``.
        alpha: weight of the positives in the focal loss; 1 - alpha of the negatives.
        gamma: focusing power >= 0.

    Returns:
        Scalar sum, float32 (float64 for float64 logits).
    """
    return _WeightedFocalSum.apply(logits, targets, weights, alpha, gamma)


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sum of the sigmoid focal loss (:paper:`RetinaNet`), targets given as class indices.

    Args:
        logits: (M, K) float.
        labels: (M,) int64 class index; K is background, -1 ignored.
        alpha: weight of the positives; 1 - alpha of the negatives.
        gamma: focusing power >= 0.

    Returns:
        Scalar sum, not yet divided by the number of positives.
    """
    targets = focal_targets(labels, logits.shape[1])
    ones = logits.new_ones(len(targets.rows), dtype=_compute_dtype(logits))
    return weighted_focal_sum(logits, targets, ones, alpha=alpha, gamma=gamma)


def iou_balanced_sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    iou: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    eta: float = 1.5,
    group: Tensor | None = None,
) -> Tensor:
    """Sum of the sigmoid focal loss whose positives are weighted by eq. 2.

    Args:
        logits: (M, K) float.
        labels: (M,) int64 class index; K is background, -1 ignored.
        iou: (P,) float, IoU of the positives' decoded boxes, in the order of their rows.
        alpha: weight of the positives in the focal loss; 1 - alpha of the negatives.
        gamma: focusing power >= 0.
        eta: power >= 0 of eq. 2; 0 is the plain focal loss.
        group: (P,) int64 or None, see :func:`iou_balanced_cls_weights`.

    Returns:
        Scalar sum, not yet divided by the number of positives.

    Raises:
        ValueError: if iou has not one entry for each positive, or eta is negative.
    """
    targets = focal_targets(labels, logits.shape[1])
    cls_loss = positive_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
    weights = iou_balanced_cls_weights(iou.to(cls_loss.dtype), cls_loss, eta=eta, group=group)
    return weighted_focal_sum(logits, targets, weights, alpha=alpha, gamma=gamma)
