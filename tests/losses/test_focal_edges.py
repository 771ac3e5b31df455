"""The focal loss where it is easily wrong: alpha below 0, ignored rows, large logits, no rows."""

import random

import numpy as np
import pytest
import torch
from fvcore.nn import sigmoid_focal_loss as fvcore_focal_loss
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from iou_balanced_d2.losses import iou_balanced_sigmoid_focal_loss, sigmoid_focal_loss
from iou_balanced_d2.losses.focal import focal_loss, focal_targets

from . import numpy_oracle as oracle

ALPHAS = (-1.0, 0.0, 0.25, 0.58, 1.0)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


def dense_loss(function, logits, labels, **hyper):
    """Another library's loss of the rows that are not ignored."""
    rows = labels >= 0
    target = F.one_hot(labels[rows], logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    return function(logits[rows], target, reduction="sum", **hyper)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(
    ("function", "dtype", "tolerance"),
    [
        (fvcore_focal_loss, torch.float32, {"rtol": 2e-5, "atol": 1e-6}),
        # fvcore rounds to float32; torchvision has the same equation in float64.
        (torchvision_focal_loss, torch.float64, {"rtol": 1e-11, "atol": 1e-14}),
    ],
    ids=["fvcore", "torchvision"],
)
def test_value_and_gradient_are_those_of(function, alpha, gamma, dtype, tolerance):
    logits = (torch.randn(200, 7, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    labels = torch.randint(-1, 8, (200,))
    loss = sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma)
    expected = dense_loss(function, logits, labels, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(loss, expected, **tolerance)
    grads = [torch.autograd.grad(x * 0.37, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, **tolerance)


def test_ignored_rows_give_exactly_nothing():
    logits = (torch.randn(20_000, 80) + 20).requires_grad_()
    labels = torch.full((20_000,), -1)
    loss = sigmoid_focal_loss(logits, labels)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_ignored_rows_may_hold_anything():
    logits = torch.tensor([[float("inf")], [float("nan")], [1.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([-1, -1, 1]))
    loss.backward()
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits[2:], torch.tensor([1])))
    assert logits.grad[:2].tolist() == [[0.0], [0.0]]


def test_no_gradient_is_so_small_that_it_slows_the_network_down():
    logits = torch.linspace(-100, 100, 401)[:, None].requires_grad_()
    for label in (0, 1):  # positive, background
        loss = sigmoid_focal_loss(logits, torch.full((401,), label))
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad[grad != 0].abs() > 1e-25).all()
        assert (grad != 0).sum() > 220


def test_a_nan_in_the_logits_is_seen():
    logits = torch.zeros(3, 2).index_fill(0, torch.tensor([1]), float("nan"))
    assert torch.isnan(sigmoid_focal_loss(logits, torch.tensor([0, 2, -1])))


def test_sure_positives_never_make_the_loss_negative():
    """A positive's own entry has a large background term, which must leave nothing behind."""
    for seed in range(50):
        torch.manual_seed(seed)
        logits = torch.rand(300, 1) * 60 + 10
        assert sigmoid_focal_loss(logits, torch.zeros(300).long()) >= 0


def test_float64_losses_far_apart_are_no_nan():
    """The one positive that hits has a loss of 1e-59, so its scale is beyond float32."""
    logits = torch.tensor([[45.0], [0.0]], dtype=torch.float64, requires_grad=True)
    iou = torch.tensor([0.5, 0.0])
    loss = iou_balanced_sigmoid_focal_loss(logits, torch.zeros(2).long(), iou)
    loss.backward()
    plain = sigmoid_focal_loss(logits, torch.zeros(2).long())
    torch.testing.assert_close(loss, plain)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (4, 0)])
def test_no_logits_give_0_with_a_gradient(shape):
    logits = torch.zeros(shape, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.full(shape[:1], shape[1]))
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == shape


def draw_case(rng):
    """Hyper-parameters, logits (M, K), labels (M,), and IoU and weights (P,) of one small case."""
    rows, num_classes = rng.randrange(7), rng.randrange(1, 5)
    dtype = rng.choice([torch.float64, torch.float32, torch.float16, torch.bfloat16])
    scale = rng.choice([0.1, 3.0, 20.0, 80.0, 700.0])
    logits = torch.randn(rows, num_classes, dtype=torch.float64).mul_(scale).to(dtype)
    labels = torch.randint(-1, num_classes + 1, (rows,))
    weights = torch.rand(int(((labels >= 0) & (labels < num_classes)).sum())) * 3
    return logits, labels, weights, {"alpha": rng.choice(ALPHAS), "gamma": rng.choice(GAMMAS)}


@pytest.mark.parametrize("cases", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_cases_equal_the_oracle(cases):
    rng = random.Random(cases)
    for case in range(cases):
        logits, labels, weights, hyper = draw_case(rng)
        logits.requires_grad_()
        levels = [logits], [focal_targets(labels, logits.shape[1])]
        dense = focal_loss(**hyper)
        own = dense.own_terms(*levels, torch.ones_like(weights))
        loss = dense.sum(*levels, own.times(weights))
        x = logits.detach().double().numpy()
        expected = oracle.focal_sum(x, labels.numpy(), weights=weights.double().numpy(), **hyper)
        loose = logits.dtype != torch.float64
        np.testing.assert_allclose(
            loss.item(), expected, rtol=1e-4 if loose else 1e-9, atol=1e-30, err_msg=f"{case}"
        )
        assert loss >= 0
        (grad,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(grad).all(), case
