"""The rivals of eq. 2, quality focal and varifocal loss, against their equations in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_balanced_d2.losses import quality_focal_loss, sigmoid_focal_loss, varifocal_loss

from . import numpy_oracle as oracle

LOSSES = {"quality_focal": quality_focal_loss, "varifocal": varifocal_loss}
each_loss = pytest.mark.parametrize("name", LOSSES)


def case(seed, rows=12, num_classes=3, scale=5.0):
    """Logits (M, K) float64, labels with background and ignored rows, and the positives' IoU."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, scale, (rows, num_classes)))
    labels = torch.from_numpy(rng.integers(-1, num_classes + 1, rows))
    num_pos = int(((labels >= 0) & (labels < num_classes)).sum())
    # IoU 0 and 1 are where the equations change or a factor vanishes.
    iou = torch.from_numpy(rng.choice([0.0, 1.0, *rng.random(4)], num_pos))
    return logits, labels, iou


def expected(name, logits, labels, iou):
    return oracle.soft_target_sum(name, logits.numpy(), labels.numpy(), iou.numpy())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(LOSSES)), st.sampled_from([0.5, 5.0, 40.0]))
def test_the_sum_is_the_papers_equation(seed, name, scale):
    arguments = case(seed, scale=scale)
    np.testing.assert_allclose(
        LOSSES[name](*arguments).item(), expected(name, *arguments), rtol=1e-10, atol=1e-12
    )


@each_loss
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_is_that_of_the_equation(name, seed):
    logits, labels, iou = case(seed, rows=8)
    leaf, iou_leaf = logits.clone().requires_grad_(), iou.clone().requires_grad_()
    LOSSES[name](leaf, labels, iou_leaf).backward()
    assert iou_leaf.grad is None, "the IoU is a target, not something to be trained"
    for index in np.ndindex(*logits.shape):
        step = torch.zeros_like(logits)
        step[index] = 1e-6
        difference = expected(name, logits + step, labels, iou) - expected(
            name, logits - step, labels, iou
        )
        np.testing.assert_allclose(leaf.grad[index].item(), difference / 2e-6, rtol=1e-4, atol=1e-7)


@each_loss
def test_without_positives_it_is_the_focal_loss_of_the_negatives(name):
    logits, labels, _ = case(0)
    labels[(labels >= 0)] = logits.shape[1]
    alpha = {"quality_focal": 0.0, "varifocal": 0.25}[name]
    got = LOSSES[name](logits, labels, logits.new_zeros(0))
    torch.testing.assert_close(got, sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=2.0))
    assert LOSSES[name](logits[:0], labels[:0], logits.new_zeros(0)) == 0


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_half_precision_logits_are_computed_with_in_float32(name, dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    logits, labels, iou = (x.to(device) for x in case(2, rows=200))
    leaf = logits.to(dtype).requires_grad_()
    loss = LOSSES[name](leaf, labels, iou.float())
    loss.backward()
    assert loss.dtype == torch.float32
    exact = leaf.detach().double().requires_grad_()
    reference = LOSSES[name](exact, labels, iou)
    reference.backward()
    torch.testing.assert_close(loss, reference.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), rtol=1e-2, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_loss
def test_the_gpu_gives_the_papers_equation(name):
    logits, labels, iou = case(3, rows=300)
    leaf = logits.float().cuda().requires_grad_()
    loss = LOSSES[name](leaf, labels.cuda(), iou.float().cuda())
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected(name, logits, labels, iou), rtol=1e-5)
    exact = logits.clone().requires_grad_()
    LOSSES[name](exact, labels, iou).backward()
    torch.testing.assert_close(leaf.grad.cpu(), exact.grad.float(), rtol=1e-4, atol=1e-6)
