"""Triton kernels of the weighted focal sum, for logits on a GPU.

The same sum as :mod:`.focal` computes in torch: forward reads the logits once and writes one
partial sum a block; backward reads them once more and writes their gradient, scaled in float32, so
that half-precision gradients are rounded once. No tensor of the logits' size is kept between the
two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)), without overflow and without losing small results."""
    e = tl.exp(-tl.abs(x))
    # log(u) alone would lose the digits of e that rounding takes from u; e / (u - 1) restores them.
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.maximum(u - 1.0, 1e-30)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _load(logits, row_class, row_weight, size, alpha, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block's logits, mirrored where the target is 1 (see focal.py), with sign and factor."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(logits + offsets, mask=mask, other=0.0).to(tl.float32)
    # Row and class of each logit; only a block's first row needs 64 bits to be found.
    first_row = start // K
    within = (start - first_row * K).to(tl.int32) + tl.arange(0, BLOCK)
    row = first_row + within // K
    label = tl.load(row_class + row, mask=mask, other=-1)
    positive = label == within % K
    weight = tl.load(row_weight + row, mask=mask & positive, other=0.0)
    sign = tl.where(positive, -1.0, 1.0)
    # A negative alpha gives positives and negatives the factor 1.
    positive_factor = tl.where(alpha < 0, 1.0, alpha)
    negative_factor = tl.where(alpha < 0, 1.0, 1.0 - alpha)
    factor = tl.where(positive, positive_factor * weight, negative_factor)
    factor = tl.where(label < 0, 0.0, factor)
    x = tl.where(label < 0, 0.0, x)  # 0 * inf would be NaN
    return x * sign, sign, factor, offsets, mask


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_class,
    row_weight,
    partial_sums,
    size,
    alpha,
    gamma,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, _, factor, _, _ = _load(logits, row_class, row_weight, size, alpha, K, BLOCK)
    s = _softplus(x)
    # p^gamma from -log(p) = s - x, p being the sigmoid of the (mirrored) logit.
    loss = factor * tl.exp(-gamma * (s - x)) * s
    tl.store(partial_sums + tl.program_id(0), tl.sum(loss, axis=0))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_class,
    row_weight,
    grad_output,
    grad,
    size,
    alpha,
    gamma,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, sign, factor, offsets, mask = _load(logits, row_class, row_weight, size, alpha, K, BLOCK)
    s = _softplus(x)
    p = tl.exp(x - s)
    slope = gamma * (1.0 - p) * s + p
    value = sign * factor * tl.exp(-gamma * (s - x)) * slope
    tl.store(grad + offsets, value * tl.load(grad_output), mask=mask)


def _rows(
    logits: Tensor, rows: Tensor, classes: Tensor, ignored: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Class (M,) int32 of each row, K for background and -1 for ignored, and weight (M,)."""
    num_rows, num_classes = logits.shape
    row_class = torch.full((num_rows,), num_classes, dtype=torch.int32, device=logits.device)
    row_class[rows] = classes.int()
    row_class[ignored] = -1
    row_weight = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    row_weight[rows] = weights.float()  # read at the positives only
    return row_class, row_weight


def focal_sum(
    logits: Tensor,
    rows: Tensor,
    classes: Tensor,
    ignored: Tensor,
    weights: Tensor,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Weighted focal sum, deterministic; see :func:`.focal.weighted_focal_sum`.

    Args:
        logits: (M, K) contiguous, float32, float16 or bfloat16.
        rows: (P,) int64, row of each positive.
        classes: (P,) int64, its class.
        ignored: (I,) int64, rows that take no part.
        weights: (P,) float.
        alpha: weight of the positives in the focal loss; below 0 nothing is weighted.
        gamma: focusing power.

    Returns:
        Scalar float32.
    """
    row_class, row_weight = _rows(logits, rows, classes, ignored, weights)
    size = logits.numel()
    num_blocks = triton.cdiv(size, _BLOCK)
    partial_sums = torch.zeros(max(num_blocks, 1), dtype=torch.float32, device=logits.device)
    if num_blocks:
        _forward_kernel[(num_blocks,)](
            logits, row_class, row_weight, partial_sums, size, alpha, gamma,
            K=logits.shape[1], BLOCK=_BLOCK,
        )  # fmt: skip
    # The order of summation is fixed. In float64, as there may be 10^4 partial sums.
    return partial_sums.double().sum().float()


def focal_grad(
    logits: Tensor,
    rows: Tensor,
    classes: Tensor,
    ignored: Tensor,
    weights: Tensor,
    alpha: float,
    gamma: float,
    grad_output: Tensor,
) -> Tensor:
    """Gradient of :func:`focal_sum` times ``grad_output`` (scalar), (M, K) of logits' dtype."""
    row_class, row_weight = _rows(logits, rows, classes, ignored, weights)
    grad = torch.empty_like(logits)
    size = logits.numel()
    if size:
        _backward_kernel[(triton.cdiv(size, _BLOCK),)](
            logits, row_class, row_weight, grad_output.float(), grad, size, alpha, gamma,
            K=logits.shape[1], BLOCK=_BLOCK,
        )  # fmt: skip
    return grad
