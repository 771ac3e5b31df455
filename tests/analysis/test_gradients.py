"""Fig. 1: the equations, autograd through the loss, and the constants."""

import math
import sys

import numpy as np
import plot_gradients
import pytest
import torch

from iou_balanced_d2.analysis import gradients
from iou_balanced_d2.analysis.gradients import (
    area_keeping_w_loc,
    gradient_by_autograd,
    gradient_by_formula,
    gradient_curves,
    max_deviation,
)


def test_equations_and_autograd_agree():
    curves = gradient_curves()
    assert len(curves) == 2 * 5
    assert max_deviation(curves) < 1e-5


def test_a_wrong_weight_would_show(monkeypatch):
    monkeypatch.setattr(gradients, "one_coordinate_iou", lambda error, _: 1 - error)
    assert max_deviation(gradient_curves([1.5])) > 0.1


@pytest.mark.parametrize("coordinate", ["centre", "size"])
def test_values_by_hand(coordinate):
    """At d = .5: IoU 1/3 of shifted boxes, e^-.5 of scaled ones; at .055 half the plain slope."""
    error = np.array([0.055, 0.5, 1.0])
    iou = {
        "centre": [0.945 / 1.055, 1 / 3, 0.0],
        "size": [math.exp(-0.055), math.exp(-0.5), math.exp(-1)],
    }[coordinate]
    expected = [2 * iou[0] ** 1.5 * 0.5, 2 * iou[1] ** 1.5, 2 * iou[2] ** 1.5]
    for gradient in (gradient_by_formula, gradient_by_autograd):
        found = gradient(error, coordinate, lambda_=1.5, w_loc=2.0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("coordinate", ["centre", "size"])
@pytest.mark.parametrize("lambda_", [0.5, 1.8])
def test_w_loc_keeps_the_area(coordinate, lambda_):
    """The plain area is 1 - beta / 2; Monte Carlo instead of trapezoids."""
    w_loc = area_keeping_w_loc(coordinate, lambda_=lambda_)
    error = torch.rand(400_000, dtype=torch.float64).numpy()
    area = gradient_by_formula(error, coordinate, lambda_=lambda_, w_loc=w_loc).mean()
    assert area == pytest.approx(1 - 0.11 / 2, abs=0.01)


def test_the_plain_loss_needs_no_constant():
    assert area_keeping_w_loc("size", lambda_=0.0) == pytest.approx(1)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["plot_gradients.py", *map(str, args)])
    return plot_gradients.main()


def test_command(monkeypatch, tmp_path, capsys):
    file = tmp_path / "fig.svg"
    assert run(monkeypatch, "--output", file, "--lambdas", 1.5) == 0
    assert file.stat().st_size > 5000
    assert "differ by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--lambdas", "-1"), "--lambdas -1.0: a power must be"),
        (("--output", "x.docx"), "--output 'x.docx' can't be written"),
        (("--output", "no/x.png"), "--output 'no/x.png' can't be written"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, tmp_path, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
