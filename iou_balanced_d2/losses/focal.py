"""Sigmoid focal loss from class indices, with a weight for each positive (eq. 1 and 2).

Shapes: logits (M, K) for M anchors and K classes; P positives among them.

Almost every one of the M * K logits is a negative. So one pass computes the background terms of all
logits, summed row by row, and their gradient; then the few rows that hold a positive are computed
anew and the ignored rows set to 0. There is no one-hot target and no masked copy. Nothing is
subtracted, so no rounding error of a large term remains.
"""

import functools
import logging
from collections.abc import Iterator
from itertools import repeat
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..threads import CPU_BLOCK, run_in_threads
from .weights import iou_balanced_cls_weights

# Elements of one block on a GPU without Triton: it bounds the memory of temporaries.
_GPU_BLOCK = 1 << 24

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


def _class_factors(alpha: float) -> tuple[float, float]:
    """Factors of the positive and the negative terms; both are 1 for a negative alpha."""
    return (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)


def _background_terms(
    x: Tensor, factor: float, gamma: float, buffers: Tensor, grad: Tensor | None = None
) -> Tensor:
    """Focal loss of logits x (any shape) towards target 0; its derivative goes to ``grad``.

    With p = sigmoid(x) and s = -log(1 - p): factor p^gamma s, whose derivative is
    factor p^gamma (gamma (1 - p) s + p). The loss is one of the ``buffers``, (3, *x.shape).
    """
    p, s, modulator = buffers
    torch.sigmoid(x, out=p)
    # log(exp(x) + exp(0)); exp, log and log1p would each start threads of MKL for every block.
    torch.logaddexp(x, x.new_zeros(()), out=s)
    torch.pow(p, gamma, out=modulator).mul_(factor)
    if grad is not None:
        torch.addcmul(s, s, p, value=-1, out=grad)
        torch.add(p, grad, alpha=gamma, out=grad).mul_(modulator)
    return modulator.mul_(s)


def _positive_terms(x: Tensor, factor: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of logits x (P,) towards target 1, and its derivative.

    The mirror of the background: target 1 at x is target 0 at -x.
    """
    grad = torch.empty_like(x)
    loss = _background_terms(-x, factor, gamma, x.new_empty(3, *x.shape), grad)
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
        alpha: weight of the positives in the focal loss; 1 - alpha of the negatives. Below 0
            neither is weighted.
        gamma: focusing power >= 0.

    Returns:
        (P,) float32 (float64 for float64 logits).
    """
    x = logits[targets.rows, targets.classes].to(_compute_dtype(logits))
    return _positive_terms(x, _class_factors(alpha)[0], gamma)[0]


def _background_rows(logits: Tensor, factor: float, gamma: float, grad: Tensor | None) -> Tensor:
    """Sums (M,) of the background terms of each row; their derivative goes to ``grad``."""
    dtype = _compute_dtype(logits)
    sums = logits.new_empty(len(logits), dtype=dtype)
    size = CPU_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK
    rows = min(max(size // max(logits.shape[1], 1), 1), max(len(logits), 1))

    def work(blocks: Iterator[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        buffers = logits.new_empty(5, rows, logits.shape[1], dtype=dtype)
        for x, row_sums, out in blocks:
            own, (x_buffer, grad_buffer) = buffers[:3, : len(x)], buffers[3:, : len(x)]
            # Half precision is converted block by block, on the way in and on the way out.
            x = x if x.dtype == dtype else x_buffer.copy_(x)
            block_grad = out if out is None or out.dtype == dtype else grad_buffer
            torch.sum(_background_terms(x, factor, gamma, own, block_grad), dim=1, out=row_sums)
            if out is not None and out.dtype != dtype:
                out.copy_(grad_buffer)

    grads = repeat(None) if grad is None else grad.split(rows)
    blocks = list(zip(logits.split(rows), sums.split(rows), grads, strict=False))
    run_in_threads(work, blocks, torch.get_num_threads() if logits.device.type == "cpu" else 1)
    return sums


def _focal_sum(
    logits: Tensor, targets: FocalTargets, weights: Tensor, alpha: float, gamma: float, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss sum and, if asked for, its derivative with respect to logits (M, K)."""
    dtype = _compute_dtype(logits)
    rows, classes, ignored = targets
    positive_factor, negative_factor = _class_factors(alpha)
    # Not float16: unscaled gradients would underflow there.
    out_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    out = torch.empty(logits.shape, dtype=out_dtype, device=logits.device) if grad else None
    sums = _background_rows(logits.detach(), negative_factor, gamma, out)

    x = logits[rows].to(dtype)  # (P, K)
    own = classes[:, None]
    loss, loss_grad = _positive_terms(x.gather(1, own), positive_factor, gamma)
    terms = _background_terms(x, negative_factor, gamma, x.new_empty(3, *x.shape))
    sums[rows] = terms.scatter(1, own, weights[:, None].to(dtype) * loss).sum(dim=1)
    sums[ignored] = 0
    if out is not None:
        out[rows, classes] = (weights * loss_grad.squeeze(1)).to(out.dtype)
        out[ignored] = 0
    # In float64, so that the order of 10^5 and more rows does not change the result.
    return sums.double().sum().to(dtype), out


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The fused kernels of :mod:`.focal_triton`, or None where they do not run.

    They are tried once on the GPU in use: if Triton lacks a compiler or does not know the GPU,
    training goes on in torch.
    """
    try:
        from . import focal_triton

        row = torch.zeros(1, dtype=torch.int64, device="cuda")
        focal_triton.focal_sum(row[:, None].float(), row, row, row[:0], row.float(), 0.25, 2.0)
    except Exception as error:  # compilers and drivers raise many kinds
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
        # The gradient is scaled in place, without a second tensor of the logits' size. Only a
        # second backward through a retained graph computes it again.
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
        alpha: weight of the positives in the focal loss; 1 - alpha of the negatives. Below 0
            neither is weighted.
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
        alpha: weight of the positives; 1 - alpha of the negatives. Below 0 neither is weighted.
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
        alpha: weight of the positives in the focal loss; 1 - alpha of the negatives. Below 0
            neither is weighted.
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
