#!/usr/bin/env python
"""Draw the paper's Fig. 1: the gradient of the IoU-balanced box loss over a box's error.

A box that is wrong in one coordinate only, by d in units of the deltas, has with its ground truth
an IoU of (1 - |d|) / (1 + |d|) (centre, boxes of one size) or e^-|d| (size). Lines are computed
from these (eq. 6 to 12), dots by autograd through the project's own loss.

python tools/plot_gradients.py --output gradients.png
"""

import argparse
import sys

import numpy as np
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou

from iou_balanced_d2.analysis.plots import new_figure, style
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.losses import iou_balanced_smooth_l1_loss

BETA = 0.11  # the knee in the author's code
IOU = {"centre": lambda d: (1 - d) / (1 + d), "size": lambda d: np.exp(-d)}
PLACE = {"centre": 0, "size": 2}  # of dx and dw in the deltas


def by_formula(error: np.ndarray, coordinate: str, lambda_: float) -> np.ndarray:
    """Norm of the gradient (S,) over the errors |d| (S,) in [0, 1], with w_loc 1."""
    return IOU[coordinate](error) ** lambda_ * np.minimum(error / BETA, 1)


def by_autograd(error: np.ndarray, coordinate: str, lambda_: float) -> np.ndarray:
    """The same by decoding the boxes, measuring their IoU and differentiating the loss."""
    anchors = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])  # and ground truth: all targets are 0
    deltas = torch.zeros(len(error), 4, dtype=torch.float64)
    deltas[:, PLACE[coordinate]] = torch.from_numpy(error)
    boxes = Box2BoxTransform((1.0,) * 4).apply_deltas(deltas, anchors.expand(len(error), 4))
    iou = pairwise_iou(Boxes(boxes), Boxes(anchors))[:, 0].double()
    deltas.requires_grad_()
    loss = iou_balanced_smooth_l1_loss(deltas, deltas * 0, iou, beta=BETA, lambda_=lambda_)
    (gradient,) = torch.autograd.grad(loss, deltas)
    return gradient[:, PLACE[coordinate]].abs().numpy()


def draw(lambdas: list[float], file: str) -> float:
    """Draw the curves; returns the largest difference between equations and autograd."""
    figure, axes = new_figure(11, 4.6, columns=2)
    error, dots = np.linspace(0, 1, 2001), slice(40, None, 120)
    largest = 0.0
    for ax, coordinate in zip(axes[0], IOU, strict=True):
        area = by_formula(error, coordinate, 0).mean()
        for i, power in enumerate((0, *lambdas)):
            line, check = (f(error, coordinate, power) for f in (by_formula, by_autograd))
            w_loc = area / line.mean()
            label = f"λ = {power:g}, w_loc = {w_loc:.2f}" if i else "smooth L1"
            color = style(i)["color"]
            ax.plot(error, w_loc * line, color=color, linewidth=2, label=label)
            ax.plot(error[dots], w_loc * check[dots], "o", color=color, markersize=3)
            largest = max(largest, float(np.abs(w_loc * (line - check)).max()))
        ax.set(xlabel="error |d|", title=coordinate, xlim=(0, 1), ylim=(0, None))
        ax.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("norm of the gradient")
    figure.supxlabel(
        "lines: eq. 6 to 12; dots: autograd through the loss; w_loc keeps the area under smooth "
        f"L1's curve on [0, 1]; knee {BETA}",
        fontsize=9,
    )
    figure.savefig(file, dpi=130)
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="gradients.png", help="the picture: .png, .svg, .pdf")
    parser.add_argument(
        "--lambdas", type=float, nargs="+", default=[0.5, 1.0, 1.5, 1.8], help="powers of eq. 4"
    )
    args = parser.parse_args()
    try:
        for value in args.lambdas:
            if not 0 < value < float("inf"):
                raise UserError(f"--lambdas {value}: a power must be a finite number above 0")
        try:
            largest = draw(args.lambdas, args.output)
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--output {args.output!r} can't be written: {reason}") from error
    except UserError as error:
        print(f"plot_gradients.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: equations and autograd differ by {largest:.1e} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
