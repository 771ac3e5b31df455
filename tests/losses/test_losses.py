"""The losses against NumPy, gradcheck, and the plain losses they become at power 0."""

import numpy as np
import pytest
import torch
from fvcore.nn import sigmoid_focal_loss as fvcore_focal_loss
from fvcore.nn import smooth_l1_loss
from torch.nn import functional as F

from iou_balanced_d2.losses import (
    iou_balanced_cls_weights,
    iou_balanced_cross_entropy,
    iou_balanced_sigmoid_focal_loss,
    iou_balanced_smooth_l1_loss,
    sigmoid_focal_loss,
)

from . import numpy_oracle as oracle

K = 3


def focal_case(seed=0, rows=40, scale=3.0, dtype=torch.float64):
    """Logits (rows, K), labels with positives, background and ignored rows, IoU (P,)."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, K, generator=rng, dtype=torch.float64) * scale
    labels = torch.randint(-1, K + 1, (rows,), generator=rng)
    num_pos = int(((labels >= 0) & (labels < K)).sum())
    iou = torch.rand(num_pos, generator=rng, dtype=torch.float64)
    return logits.to(dtype), labels, iou.to(dtype)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_focal_loss_is_the_equation(alpha, gamma, eta):
    logits, labels, iou = focal_case(seed=int(gamma * 4))
    x, y = logits.numpy(), labels.numpy()
    ce = oracle.positive_ce(x, y, alpha, gamma)
    weights = oracle.cls_weights(iou.numpy(), ce, eta)
    expected = oracle.focal_sum(x, y, alpha, gamma, weights)
    loss = iou_balanced_sigmoid_focal_loss(logits, labels, iou, alpha=alpha, gamma=gamma, eta=eta)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)
    if eta == 0:
        plain = sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma)
        np.testing.assert_allclose(plain.item(), expected, rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 2.5])
def test_focal_loss_gradcheck(gamma):
    logits, labels, iou = focal_case(rows=12)
    # The weights are constants: at their values here, the loss is a plain function of the logits.
    ce = torch.from_numpy(oracle.positive_ce(logits.numpy(), labels.numpy(), 0.25, gamma))
    weights = iou_balanced_cls_weights(iou, ce, eta=1.5)

    def with_constant_weights(x):
        plain = sigmoid_focal_loss(x, labels, gamma=gamma)
        rows = ((labels >= 0) & (labels < K)).nonzero().squeeze(1)
        own = x[rows, labels[rows]]
        term = 0.25 * torch.sigmoid(-own) ** gamma * F.softplus(-own)
        return plain + ((weights - 1) * term).sum()

    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, labels, gamma=gamma), logits.requires_grad_()
    )
    loss = iou_balanced_sigmoid_focal_loss(logits, labels, iou, gamma=gamma)
    torch.testing.assert_close(loss, with_constant_weights(logits))
    (grad,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(with_constant_weights(logits), logits)
    torch.testing.assert_close(grad, expected)


def test_focal_gradient_survives_a_second_backward():
    logits, labels, iou = focal_case()
    logits.requires_grad_()
    loss = iou_balanced_sigmoid_focal_loss(logits, labels, iou)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, logits)
    torch.testing.assert_close(first, kept)
    torch.testing.assert_close(second, 2 * kept)


def test_focal_sum_of_positives_is_kept():
    logits, labels, iou = focal_case(rows=300)
    balanced = iou_balanced_sigmoid_focal_loss(logits, labels, iou, eta=1.5)
    torch.testing.assert_close(balanced, sigmoid_focal_loss(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_focal_arithmetic_is_float32_for_half_precision_logits(dtype):
    logits, labels, iou = focal_case(rows=500, dtype=dtype)
    logits.requires_grad_()
    loss = iou_balanced_sigmoid_focal_loss(logits, labels, iou)
    exact = logits.detach().float().requires_grad_()
    expected = iou_balanced_sigmoid_focal_loss(exact, labels, iou.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_focal_loss_of_extreme_logits_is_finite(dtype):
    logits = torch.tensor([[80.0, -80.0, 0.0]] * 4, dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 1, K, -1])
    loss = iou_balanced_sigmoid_focal_loss(logits, labels, torch.tensor([0.9, 0.4], dtype=dtype))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[3] == 0).all(), "ignored rows get no gradient"


def test_focal_loss_is_the_same_over_many_blocks():
    logits, labels, iou = focal_case(rows=60_000, dtype=torch.float32)
    logits.requires_grad_()
    loss = iou_balanced_sigmoid_focal_loss(logits, labels, iou, eta=0.0)
    target = F.one_hot(labels.clamp(min=0), K + 1)[:, :-1].float()
    dense = fvcore_focal_loss(logits, target, alpha=0.25, gamma=2.0)
    expected = (dense * (labels >= 0)[:, None]).double().sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_focal_loss_without_positives_and_without_rows():
    logits = torch.randn(5, K, requires_grad=True)
    loss = iou_balanced_sigmoid_focal_loss(logits, torch.full((5,), K), torch.zeros(0))
    loss.backward()
    assert loss > 0
    assert logits.grad.abs().sum() > 0
    empty = torch.zeros(0, K, requires_grad=True)
    loss = iou_balanced_sigmoid_focal_loss(empty, torch.zeros(0).long(), torch.zeros(0))
    loss.backward()
    assert loss == 0


def test_focal_loss_refuses_iou_that_does_not_fit():
    logits, labels, iou = focal_case()
    with pytest.raises(ValueError, match="one shape"):
        iou_balanced_sigmoid_focal_loss(logits, labels, iou[:-1])


@pytest.mark.parametrize("beta", [0.11, 1.0])
@pytest.mark.parametrize("lambda_", [0.0, 1.5])
def test_smooth_l1_is_the_equation(beta, lambda_):
    pred, target = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    target[:5] = pred[:5] + 0.05
    iou = torch.rand(20).double()
    loss = iou_balanced_smooth_l1_loss(pred, target, iou, beta=beta, lambda_=lambda_, w_loc=2.34)
    rows = oracle.loc_loss(pred.numpy(), target.numpy(), beta)
    expected = (2.34 * iou.numpy() ** lambda_ * rows).sum()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


def test_smooth_l1_gradient_is_weight_times_plain_gradient():
    pred = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    target, iou = torch.randn(20, 4).double(), torch.rand(20).double()

    def loss_of(x):
        return iou_balanced_smooth_l1_loss(x, target, iou, w_loc=3.049)

    assert torch.autograd.gradcheck(loss_of, pred)
    (grad,) = torch.autograd.grad(loss_of(pred), pred)
    (plain,) = torch.autograd.grad(smooth_l1_loss(pred, target, beta=0.11, reduction="sum"), pred)
    torch.testing.assert_close(grad, plain * (3.049 * iou**1.5)[:, None])


def test_smooth_l1_without_positives_keeps_the_graph():
    pred = torch.zeros(0, 4, requires_grad=True)
    loss = iou_balanced_smooth_l1_loss(pred, torch.zeros(0, 4), torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert pred.grad.shape == (0, 4)


def test_smooth_l1_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(P, 4\)"):
        iou_balanced_smooth_l1_loss(torch.ones(3, 4), torch.ones(3, 4), torch.ones(2))


@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_cross_entropy_is_the_equation(eta):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(30, K + 1, generator=rng, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, K + 1, (30,), generator=rng)
    positive = (labels >= 0) & (labels < K)
    iou = torch.rand(int(positive.sum()), generator=rng, dtype=torch.float64)
    loss = iou_balanced_cross_entropy(logits, labels, iou, eta=eta)

    x, y = logits.detach().numpy(), labels.numpy()
    logp = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    expected = np.array([0.0 if c == -1 else -row[c] for row, c in zip(logp, y, strict=True)])
    chosen = positive.numpy()
    weights = oracle.cls_weights(iou.numpy(), expected[chosen], eta)
    expected[chosen] *= weights
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-10, atol=1e-12)

    row_weights = torch.ones(30, dtype=torch.float64)
    row_weights[positive] = torch.from_numpy(weights)
    plain = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    (expected_grad,) = torch.autograd.grad((plain * row_weights).sum(), logits)
    torch.testing.assert_close(grad, expected_grad)
