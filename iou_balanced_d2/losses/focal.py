"""Sigmoid focal loss from class indices, with a weight for each positive (eq. 1 and 2).

Shapes: logits (M, K) for M anchors and K classes; P positives among them.

Almost every one of the M * K logits is a negative. So one pass computes the background terms of all
logits, summed row by row, and their gradient; then the few rows that hold a positive are computed
anew, with the term of its own class put in, and the ignored rows set to 0. There is no one-hot
target and no masked copy. Nothing is subtracted, so no rounding error of a large term remains.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..threads import CPU_BLOCK, run_in_threads
from .weights import at_least_float32, iou_balanced_cls_weights

# Elements of one block on a GPU without Triton: it bounds the memory of temporaries.
_GPU_BLOCK = 1 << 24
# Smaller derivatives are set to 0. As denormal numbers, which they become on the way back through
# the network, they would make a CPU's convolutions several times slower.
_SMALLEST_GRAD = 1e-24

logger = logging.getLogger(__name__)


class FocalTargets(NamedTuple):
    """Where the logits (M, K) of one level are not plain background."""

    rows: Tensor  # (P,) int64, row of each positive
    classes: Tensor  # (P,) int64, its class in [0, K)
    ignored: Tensor  # (I,) int64, rows that take no part in the loss


class OwnTerms(NamedTuple):
    """The terms of the positives' own entries, each at its row and class. Both are constants."""

    loss: Tensor  # (P,) float
    grad: Tensor  # (P,) float, derivative of each term with respect to its logit

    def times(self, weights: Tensor) -> "OwnTerms":
        """The terms times weights (P,)."""
        return OwnTerms(self.loss * weights, self.grad * weights)


def focal_targets(labels: Tensor, num_classes: int) -> FocalTargets:
    """Read labels (M,) int64 (class index; K = background, -1 = ignored) into index form."""
    rows = ((labels >= 0) & (labels != num_classes)).nonzero().squeeze(1)
    return FocalTargets(rows, labels[rows], (labels < 0).nonzero().squeeze(1))


def _background_terms(
    x: Tensor, factor: float, gamma: float, buffers: Tensor, grad: Tensor | None = None
) -> Tensor:
    """Focal loss of logits x (any shape) towards target 0; its derivative goes to ``grad``.

    With p = sigmoid(x) and s = -log(1 - p): factor p^gamma s, whose derivative is
    factor p^gamma (gamma (1 - p) s + p) >= 0. The loss is one of the ``buffers``, (3, *x.shape).
    """
    p, s, modulator = buffers
    torch.sigmoid(x, out=p)
    # log(exp(x) + exp(0)); exp, log and log1p would each start threads of MKL for every block.
    torch.logaddexp(x, x.new_zeros(()), out=s)
    torch.pow(p, gamma, out=modulator).mul_(factor)
    if grad is not None:
        torch.addcmul(s, s, p, value=-1, out=grad)
        torch.add(p, grad, alpha=gamma, out=grad).mul_(modulator)
        torch.threshold_(grad, _SMALLEST_GRAD, 0.0)
    return modulator.mul_(s)


def focal_terms(logits: Tensor, *, factor: float, gamma: float) -> OwnTerms:
    """Focal terms of logits (P,) towards target 0: factor * p^gamma * CE(p, 0)."""
    grad = torch.empty_like(logits)
    buffers = logits.new_empty(3, *logits.shape)
    return OwnTerms(_background_terms(logits, factor, gamma, buffers, grad), grad)


def _mirrored_focal_terms(logits: Tensor, iou: Tensor, *, factor: float, gamma: float) -> OwnTerms:
    """Focal terms of logits (P,) towards target 1, which is target 0 at the negated logits."""
    loss, grad = focal_terms(-logits, factor=factor, gamma=gamma)
    return OwnTerms(loss, -grad)


def _background_rows(logits: Tensor, factor: float, gamma: float, grad: Tensor | None) -> Tensor:
    """Sums (M,) of the background terms of each row; their derivative goes to ``grad``."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
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


def _dense_sum(
    logits: Tensor, targets: FocalTargets, own: OwnTerms, factor: float, gamma: float, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss sum and, if asked for, its derivative with respect to logits (M, K)."""
    rows, classes, ignored = targets
    # Not float16: unscaled gradients would underflow there.
    out_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    out = torch.empty(logits.shape, dtype=out_dtype, device=logits.device) if grad else None
    sums = _background_rows(logits.detach(), factor, gamma, out)

    x = logits[rows].to(sums.dtype)  # (P, K)
    terms = _background_terms(x, factor, gamma, x.new_empty(3, *x.shape))
    sums[rows] = terms.scatter(1, classes[:, None], own.loss[:, None].to(sums.dtype)).sum(dim=1)
    sums[ignored] = 0
    if out is not None:
        out[rows, classes] = own.grad.to(out.dtype)
        out[ignored] = 0
    # In float64, so that the order of 10^5 and more rows does not change the result.
    return sums.double().sum().to(sums.dtype), out


@functools.cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """The fused kernels of :mod:`.focal_triton`, or None where they do not run.

    They are tried once on each GPU in use: if Triton lacks a compiler or does not know the GPU,
    training goes on in torch.
    """
    try:
        from . import focal_triton

        row = torch.zeros(1, dtype=torch.int64, device=device)
        inputs = (row[:, None].float(), row, row, row[:0], 0.75, 2.0)
        focal_triton.background_grad(*inputs, focal_triton.background_sum(*inputs))
    except Exception as error:  # compilers and drivers raise many kinds
        logger.warning(f"Focal loss without Triton, in plain torch: {error!r}")
        return None
    return focal_triton


def _kernels_for(logits: Tensor) -> ModuleType | None:
    if logits.is_cuda and logits.dtype != torch.float64:
        return _triton_kernels(logits.device)
    return None


class _DenseSum(torch.autograd.Function):
    """The scalar loss of one level; see :class:`DenseLoss`.

    On the CPU, where the arithmetic costs most, the forward pass makes the gradient too. On a GPU,
    where memory traffic does, the backward pass computes it from the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: FocalTargets,
        own: OwnTerms,
        factor: float,
        gamma: float,
    ) -> Tensor:
        logits = logits.contiguous()
        ctx.save_for_backward(logits, *own, *targets)
        ctx.hyper, ctx.grad = (factor, gamma), None
        if kernels := _kernels_for(logits):
            background = kernels.background_sum(logits, *targets, factor, gamma)
            return (background + own.loss.double().sum()).float()
        grad = ctx.needs_input_grad[0] and logits.device.type == "cpu"
        total, ctx.grad = _dense_sum(logits, targets, own, factor, gamma, grad=grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        own, targets, (factor, gamma) = OwnTerms(*saved[:2]), FocalTargets(*saved[2:]), ctx.hyper
        # The gradient is scaled in place, without a second tensor of the logits' size. Only a
        # second backward through a retained graph computes it again.
        grad, ctx.grad = ctx.grad, None
        if grad is None and (kernels := _kernels_for(logits)):
            grad = kernels.background_grad(logits, *targets, factor, gamma, grad_output)
            grad[targets.rows, targets.classes] = (own.grad * grad_output).to(grad.dtype)
            return grad, None, None, None, None
        if grad is None:
            grad = _dense_sum(logits, targets, own, factor, gamma, grad=True)[1]
            assert grad is not None
        return grad.mul_(grad_output).to(logits.dtype), None, None, None, None


class DenseLoss(NamedTuple):
    """A sigmoid loss of all logits whose terms are focal ones of target 0, but for the positives'.

    Of a positive only the entry of its own class differs; its other K - 1 entries are negatives, as
    in the author's code.
    """

    factor: float  # of the negatives' terms, factor * p^gamma * CE(p, 0)
    gamma: float  # focusing power >= 0 of the negatives' terms
    # (P,) own logits, float32 or float64, and (P,) IoU to the :class:`OwnTerms`.
    terms_of: Callable[[Tensor, Tensor], OwnTerms]

    @torch.no_grad()
    def own_terms(
        self, logits: Sequence[Tensor], targets: Sequence[FocalTargets], iou: Tensor
    ) -> OwnTerms:
        """The terms of the positives of all levels; their loss is CE_i of eq. 2.

        Logits are L tensors (M, K) of any precision, the IoU (P,) is in the order of the rows; the
        terms are float32 (float64 for float64 logits).
        """
        pairs = zip(logits, targets, strict=True)
        x = torch.cat([level[target.rows, target.classes] for level, target in pairs])
        x = at_least_float32(x)
        return self.terms_of(x, iou.to(x.dtype))

    def sum(
        self, logits: Sequence[Tensor], targets: Sequence[FocalTargets], own: OwnTerms
    ) -> Tensor:
        """The loss, a scalar, float32 or float64; eq. 1 if the own terms are weighted by eq. 2."""
        sizes = [len(target.rows) for target in targets]
        own_of_levels = map(OwnTerms, own.loss.split(sizes), own.grad.split(sizes))
        levels = zip(logits, targets, own_of_levels, strict=True)
        return torch.stack(
            [_DenseSum.apply(*level, self.factor, self.gamma) for level in levels]
        ).sum()


def focal_loss(alpha: float, gamma: float) -> DenseLoss:
    """The sigmoid focal loss (:paper:`RetinaNet`), see :func:`sigmoid_focal_loss`."""
    positive, negative = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    terms_of = functools.partial(_mirrored_focal_terms, factor=positive, gamma=gamma)
    return DenseLoss(negative, gamma, terms_of)


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sum of the sigmoid focal loss (:paper:`RetinaNet`), targets given as class indices.

    Args:
        logits: (M, K) float.
        labels: (M,) int64 class index; K is background, -1 ignored.
        alpha: weight of the positives; 1 - alpha of the negatives. Below 0 both weigh 1.
        gamma: focusing power >= 0.

    Returns:
        Scalar sum, not yet divided by the number of positives.
    """
    targets, loss = [focal_targets(labels, logits.shape[1])], focal_loss(alpha, gamma)
    no_iou = logits.new_empty(len(targets[0].rows))  # the focal loss does not read it
    return loss.sum([logits], targets, loss.own_terms([logits], targets, no_iou))


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
        alpha: weight of the positives in the focal loss; 1 - alpha of the negatives. Below 0 both
            weigh 1.
        gamma: focusing power >= 0.
        eta: power >= 0 of eq. 2; 0 is the plain focal loss.
        group: (P,) int64 or None, see :func:`iou_balanced_cls_weights`.

    Returns:
        Scalar sum, not yet divided by the number of positives.

    Raises:
        ValueError: if iou has not one entry for each positive, or eta is negative.
    """
    targets, loss = [focal_targets(labels, logits.shape[1])], focal_loss(alpha, gamma)
    own = loss.own_terms([logits], targets, iou)
    weights = iou_balanced_cls_weights(iou, own.loss, eta=eta, group=group)
    return loss.sum([logits], targets, own.times(weights))
