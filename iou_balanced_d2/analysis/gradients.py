"""The paper's Fig. 1: what the IoU-balanced box loss does to the gradient of one coordinate.

A box that is wrong in one coordinate only, by d in units of the deltas, has with its ground truth
an IoU of (1 - |d|) / (1 + |d|) (centre, boxes of one size, |d| <= 1) or e^-|d| (size). Each curve
is computed from these (eq. 6 to 12), and once more by autograd through the project's own loss on
boxes decoded by detectron2.

Letters: S errors d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou
from numpy.typing import NDArray
from scipy.integrate import trapezoid

from ..losses import iou_balanced_smooth_l1_loss
from .plots import new_figure, style

Array = NDArray[Any]

COORDINATES = {"centre": 0, "size": 2}  # place of dx and dw in the deltas
LAMBDAS = (0.5, 1.0, 1.5, 1.8)
_BETA = 0.11  # the knee in the author's code
_DASHES = (":", "--", "-.", "-")


@dataclass(frozen=True)
class Curve:
    """The gradient's norm over the error, for one power and coordinate.

    Attributes:
        coordinate: "centre" or "size".
        lambda_: the power; 0 is smooth L1.
        w_loc: the constant of eq. 4 that keeps the area under smooth L1's curve on [0, 1].
        formula: (S,) by the equations.
        autograd: (S,) through the loss.
    """

    coordinate: str
    lambda_: float
    w_loc: float
    formula: Array
    autograd: Array


def one_coordinate_iou(error: Array, coordinate: str) -> Array:
    """IoU (S,) of a box wrong by ``error`` (S,) in [0, 1], in centre or size (eq. 7 to 12)."""
    return (1 - error) / (1 + error) if coordinate == "centre" else np.exp(-error)


def gradient_by_formula(
    error: Array, coordinate: str, *, lambda_: float, w_loc: float = 1.0, beta: float = _BETA
) -> Array:
    """Norm of the loss's gradient with respect to one coordinate, by eq. 7 to 12.

    Args:
        error: (S,) |d| in [0, 1].
        coordinate: "centre" or "size".
        lambda_: power of eq. 4; 0 is smooth L1.
        w_loc: constant of eq. 4.
        beta: knee of smooth L1, the paper's delta.

    Returns:
        (S,) float64.
    """
    weight = w_loc * one_coordinate_iou(error, coordinate) ** lambda_
    return weight * np.minimum(error / beta, 1.0)


def gradient_by_autograd(
    error: Array, coordinate: str, *, lambda_: float, w_loc: float = 1.0, beta: float = _BETA
) -> Array:
    """The same by decoding the box, measuring its IoU and differentiating the project's loss.

    Args and result are those of :func:`gradient_by_formula`.
    """
    place = COORDINATES[coordinate]
    anchor = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])  # and ground truth: all targets are 0
    deltas = torch.zeros(len(error), 4, dtype=torch.float64)
    deltas[:, place] = torch.from_numpy(error)
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    boxes = transform.apply_deltas(deltas, anchor.expand(len(error), 4))
    iou = pairwise_iou(Boxes(boxes), Boxes(anchor))[:, 0].double()
    deltas.requires_grad_()
    loss = iou_balanced_smooth_l1_loss(
        deltas, torch.zeros_like(deltas), iou, beta=beta, lambda_=lambda_, w_loc=w_loc
    )
    (gradient,) = torch.autograd.grad(loss, deltas)
    return gradient[:, place].abs().numpy()


def area_keeping_w_loc(coordinate: str, *, lambda_: float, beta: float = _BETA) -> float:
    """The w_loc for which the area under the curve on [0, 1] is that of smooth L1's."""
    error = np.linspace(0, 1, 20_001)
    plain, weighted = (
        gradient_by_formula(error, coordinate, lambda_=power, beta=beta) for power in (0, lambda_)
    )
    return float(trapezoid(plain, error) / trapezoid(weighted, error))


def gradient_curves(lambdas: Sequence[float] = LAMBDAS, *, num_points: int = 201) -> list[Curve]:
    """Fig. 1's curves, for the centre and the size, smooth L1 (power 0) first.

    Args:
        lambdas: powers of eq. 4, >= 0.
        num_points: S, errors spaced evenly on [0, 1].

    Returns:
        one curve for each coordinate and power.
    """
    error = np.linspace(0, 1, num_points)
    curves = []
    for coordinate in COORDINATES:
        for lambda_ in (0.0, *lambdas):
            w_loc = area_keeping_w_loc(coordinate, lambda_=lambda_)
            formula, autograd = (
                gradient(error, coordinate, lambda_=lambda_, w_loc=w_loc)
                for gradient in (gradient_by_formula, gradient_by_autograd)
            )
            curves.append(Curve(coordinate, lambda_, w_loc, formula, autograd))
    return curves


def max_deviation(curves: Sequence[Curve]) -> float:
    """Largest difference between the equations and autograd over all curves."""
    return max(float(np.abs(c.formula - c.autograd).max()) for c in curves)


def draw_gradients(curves: Sequence[Curve], file: Path) -> None:
    """Draw the curves, lines by the equations and dots by autograd.

    Args:
        curves: of :func:`gradient_curves`.
        file: the picture; its ending says the format.

    Raises:
        ValueError: if matplotlib does not know the format.
        OSError: if the file can't be written.
    """
    figure, axes = new_figure(11, 4.6, columns=len(COORDINATES))
    for ax, coordinate in zip(axes[0], COORDINATES, strict=True):
        of_coordinate = [c for c in curves if c.coordinate == coordinate]
        for i, curve in enumerate(of_coordinate):
            error = np.linspace(0, 1, len(curve.formula))
            color, dashes = style(i)["color"], _DASHES[i % len(_DASHES)] if i else "-"
            label = f"λ = {curve.lambda_:g}, w_loc = {curve.w_loc:.2f}" if i else "smooth L1"
            ax.plot(error, curve.formula, dashes, color=color, linewidth=2, label=label)
            shown = slice(4, None, 12)
            ax.plot(error[shown], curve.autograd[shown], "o", color=color, markersize=3)
        ax.set(xlabel="error |d|", title=coordinate, xlim=(0, 1), ylim=(0, None))
        ax.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("norm of the gradient")
    figure.supxlabel(
        "lines: eq. 6 to 12; dots: autograd through the loss; w_loc keeps the area under smooth "
        f"L1's curve on [0, 1]; knee {_BETA}",
        fontsize=9,
    )
    figure.savefig(file, dpi=130)
