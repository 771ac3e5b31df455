"""Triton kernels of the background terms, for logits on a GPU.

The same sum as :mod:`.focal` computes in torch, without the positives' own entries and the ignored
rows: forward reads the logits once and writes one partial sum a block; backward reads them once
more and writes their gradient, scaled in float32, so that half-precision gradients are rounded
once. No tensor of the logits' size is kept between the two.
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
def _load(logits, row_class, size, factor, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block's logits with the factor of their terms, 0 at own entries and ignored rows."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(logits + offsets, mask=mask, other=0.0).to(tl.float32)
    # Row and class of each logit; only a block's first row needs 64 bits to be found.
    first_row = start // K
    within = (start - first_row * K).to(tl.int32) + tl.arange(0, BLOCK)
    label = tl.load(row_class + first_row + within // K, mask=mask, other=-1)
    counts = (label >= 0) & (label != within % K)
    # Both, as 0 * inf would be NaN.
    return tl.where(counts, x, 0.0), tl.where(counts, factor, 0.0), offsets, mask


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_class,
    partial_sums,
    size,
    factor,
    gamma,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, factor, _, _ = _load(logits, row_class, size, factor, K, BLOCK)
    s = _softplus(x)
    # p^gamma from log(p) = x - s, p being the sigmoid of the logit.
    loss = factor * tl.exp(gamma * (x - s)) * s
    tl.store(partial_sums + tl.program_id(0), tl.sum(loss, axis=0))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_class,
    grad_output,
    grad,
    size,
    factor,
    gamma,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, factor, offsets, mask = _load(logits, row_class, size, factor, K, BLOCK)
    s = _softplus(x)
    p = tl.exp(x - s)
    slope = gamma * (1.0 - p) * s + p
    value = factor * tl.exp(gamma * (x - s)) * slope
    tl.store(grad + offsets, value * tl.load(grad_output), mask=mask)


def _row_class(logits: Tensor, rows: Tensor, classes: Tensor, ignored: Tensor) -> Tensor:
    """Class (M,) int32 of each row, K for background and -1 for ignored."""
    num_rows, num_classes = logits.shape
    row_class = torch.full((num_rows,), num_classes, dtype=torch.int32, device=logits.device)
    row_class[rows] = classes.int()
    row_class[ignored] = -1
    return row_class


def background_sum(
    logits: Tensor, rows: Tensor, classes: Tensor, ignored: Tensor, factor: float, gamma: float
) -> Tensor:
    """Sum of the background terms, scalar float64, deterministic; see :class:`.focal.DenseLoss`.

    Logits are (M, K) contiguous, float32, float16 or bfloat16; the rest is a
    :class:`.focal.FocalTargets`.
    """
    row_class = _row_class(logits, rows, classes, ignored)
    size = logits.numel()
    num_blocks = triton.cdiv(size, _BLOCK)
    partial_sums = torch.zeros(max(num_blocks, 1), dtype=torch.float32, device=logits.device)
    if num_blocks:
        with torch.cuda.device_of(logits):  # Triton launches on the current one
            _forward_kernel[(num_blocks,)](
                logits, row_class, partial_sums, size, factor, gamma,
                K=logits.shape[1], BLOCK=_BLOCK,
            )  # fmt: skip
    # The order of summation is fixed. In float64, as there may be 10^4 partial sums.
    return partial_sums.double().sum()


def background_grad(
    logits: Tensor,
    rows: Tensor,
    classes: Tensor,
    ignored: Tensor,
    factor: float,
    gamma: float,
    grad_output: Tensor,
) -> Tensor:
    """Gradient (M, K) of :func:`background_sum` times a scalar ``grad_output``; logits' dtype."""
    row_class = _row_class(logits, rows, classes, ignored)
    grad = torch.empty_like(logits)
    size = logits.numel()
    if size:
        with torch.cuda.device_of(logits):
            _backward_kernel[(triton.cdiv(size, _BLOCK),)](
                logits, row_class, grad_output.float(), grad, size, factor, gamma,
                K=logits.shape[1], BLOCK=_BLOCK,
            )  # fmt: skip
    return grad
