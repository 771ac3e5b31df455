"""The weights of eq. 2, 4 and 5 against NumPy, and their corner cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_balanced_d2.losses import (
    iou_balanced_cls_weights,
    iou_balanced_loc_weights,
    measure_w_loc,
)

from . import numpy_oracle as oracle

positives = st.integers(0, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n),
        st.lists(st.floats(0, 100, width=32), min_size=n, max_size=n),
        st.lists(st.integers(0, 5), min_size=n, max_size=n),
    )
)
powers = st.sampled_from([0.0, 0.5, 1.0, 1.5, 1.8, 3.0])


@settings(max_examples=400, deadline=None)
@given(positives, powers, st.booleans())
def test_cls_weights_are_eq_2(case, eta, grouped):
    iou, loss, group = (np.array(x) for x in case)
    # Below this the sums leave float64's normal range and the quotient means nothing.
    loss = np.where(loss < 1e-6, 0, loss)
    iou = np.where(iou < 1e-6, 0, iou)
    group = group.astype(np.int64) if grouped else None
    weights = iou_balanced_cls_weights(
        torch.tensor(iou, dtype=torch.float64),
        torch.tensor(loss, dtype=torch.float64),
        eta=eta,
        group=None if group is None else torch.from_numpy(group),
    )
    np.testing.assert_allclose(
        weights.numpy(), oracle.cls_weights(iou, loss, eta, group), rtol=1e-9, atol=1e-12
    )


@settings(max_examples=400, deadline=None)
@given(positives, powers)
def test_cls_weights_keep_the_sum_and_grow_with_iou(case, eta):
    iou, loss = (torch.tensor(x, dtype=torch.float32) for x in case[:2])
    weights = iou_balanced_cls_weights(iou, loss, eta=eta)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close((weights * loss).sum(), loss.sum(), rtol=1e-4, atol=1e-6)
    order = torch.argsort(iou)
    # Equal IoUs may differ by rounding: the power is vectorised but for the last few rows.
    rounding = 1e-5 * weights[order][1:]
    assert (weights[order].diff() >= -rounding).all()


def test_cls_weights_sum_is_kept_within_each_group():
    iou = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.0])
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    group = torch.tensor([3, 3, 0, 0, 7])
    weights = iou_balanced_cls_weights(iou, loss, eta=1.5, group=group)
    for g in (3, 0, 7):
        torch.testing.assert_close((weights * loss)[group == g].sum(), loss[group == g].sum())
    assert weights[4] == 1, "a group whose IoUs are all 0 keeps the plain loss"


def test_weights_without_positives_with_one_and_with_all_iou_zero():
    none = torch.zeros(0)
    assert iou_balanced_cls_weights(none, none, eta=1.5).shape == (0,)
    assert iou_balanced_cls_weights(none, none, eta=1.5, group=none.long()).shape == (0,)
    assert iou_balanced_loc_weights(none, lambda_=1.5).shape == (0,)
    assert measure_w_loc(none, none, lambda_=1.5) == 1
    one = iou_balanced_cls_weights(torch.tensor([0.3]), torch.tensor([2.0]), eta=1.5)
    torch.testing.assert_close(one, torch.ones(1))
    zeros, losses = torch.zeros(4), torch.rand(4)
    assert iou_balanced_cls_weights(zeros, losses, eta=1.5).tolist() == [1, 1, 1, 1]
    assert measure_w_loc(zeros, losses, lambda_=1.5) == 1


def test_loc_weights_are_eq_4_and_measured_w_loc_keeps_the_sum():
    iou, loss = torch.rand(50).double(), torch.rand(50).double()
    w_loc = measure_w_loc(iou, loss, lambda_=1.5)
    expected = loss.sum() / sum(float(i) ** 1.5 * float(x) for i, x in zip(iou, loss, strict=True))
    torch.testing.assert_close(w_loc, expected)
    weights = iou_balanced_loc_weights(iou, lambda_=1.5, w_loc=3.049)
    np.testing.assert_allclose(weights.numpy(), 3.049 * iou.numpy() ** 1.5)
    weights = iou_balanced_loc_weights(iou, lambda_=1.5, w_loc=w_loc)
    torch.testing.assert_close((weights * loss).sum(), loss.sum())


def test_weights_carry_no_gradient():
    iou = torch.rand(5, requires_grad=True)
    loss = torch.rand(5, requires_grad=True)
    assert not iou_balanced_cls_weights(iou, loss, eta=1.5).requires_grad
    assert not iou_balanced_loc_weights(iou, lambda_=1.5).requires_grad
    assert not measure_w_loc(iou, loss, lambda_=1.5).requires_grad


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_powers_are_refused(bad):
    rows = torch.ones(2)
    with pytest.raises(ValueError, match="eta must be"):
        iou_balanced_cls_weights(rows, rows, eta=bad)
    with pytest.raises(ValueError, match="lambda_ must be"):
        iou_balanced_loc_weights(rows, lambda_=bad)
    with pytest.raises(ValueError, match="lambda_ must be"):
        measure_w_loc(rows, rows, lambda_=bad)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        iou_balanced_cls_weights(torch.ones(2), torch.ones(3), eta=1.0)
    with pytest.raises(ValueError, match="one shape"):
        measure_w_loc(torch.ones(2, 1), torch.ones(2, 1), lambda_=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_neither_overflow_nor_stand_still(dtype):
    rng = torch.Generator().manual_seed(0)
    iou = torch.rand(20_000, generator=rng).to(dtype)
    loss = (4.4 + torch.rand(20_000, generator=rng)).to(dtype)
    group = torch.arange(20_000) % 3
    for groups in (None, group):
        weights = iou_balanced_cls_weights(iou, loss, eta=1.5, group=groups)
        sums = (weights.double() * loss.double()).sum(), loss.double().sum()
        assert float(sums[0] / sums[1]) == pytest.approx(1, rel=1e-3)
    exact = measure_w_loc(iou.double(), loss.double(), lambda_=1.5)
    assert float(measure_w_loc(iou, loss, lambda_=1.5)) == pytest.approx(float(exact), rel=1e-3)
