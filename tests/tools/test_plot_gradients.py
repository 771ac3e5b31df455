"""Fig. 1: the equations, autograd through the loss, and the command."""

import math
import re
import sys

import numpy as np
import plot_gradients
import pytest


@pytest.mark.parametrize("coordinate", ["centre", "size"])
def test_values_by_hand(coordinate):
    """At d = .5: IoU 1/3 of shifted boxes, e^-.5 of scaled ones; at .055 half the plain slope."""
    error = np.array([0.055, 0.5, 1.0])
    iou = {
        "centre": [0.945 / 1.055, 1 / 3, 0.0],
        "size": [math.exp(-0.055), math.exp(-0.5), math.exp(-1)],
    }[coordinate]
    expected = [iou[0] ** 1.5 * 0.5, iou[1] ** 1.5, iou[2] ** 1.5]
    for gradient in (plot_gradients.by_formula, plot_gradients.by_autograd):
        np.testing.assert_allclose(gradient(error, coordinate, 1.5), expected, atol=1e-6)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["plot_gradients.py", *map(str, args)])
    return plot_gradients.main()


def test_equations_and_autograd_agree(monkeypatch, tmp_path, capsys):
    file = tmp_path / "fig.svg"
    assert run(monkeypatch, "--output", file) == 0
    assert file.stat().st_size > 5000
    (difference,) = re.findall("differ by (.*) at most", capsys.readouterr().out)
    assert float(difference) < 1e-5
    monkeypatch.setitem(plot_gradients.IOU, "size", lambda d: 1 - d)
    assert plot_gradients.draw([1.5], str(file)) > 0.1, "a wrong weight would show"


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
