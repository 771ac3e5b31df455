#!/usr/bin/env python
"""Draw the paper's Fig. 1: the gradient of the IoU-balanced box loss over a box's error.

python tools/plot_gradients.py --output gradients.png
"""

import argparse
import sys
from pathlib import Path

from iou_balanced_d2.analysis.gradients import (
    LAMBDAS,
    draw_gradients,
    gradient_curves,
    max_deviation,
)
from iou_balanced_d2.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="gradients.png", help="the picture: .png, .svg, .pdf")
    parser.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS, help="powers of eq. 4")
    args = parser.parse_args()
    for value in args.lambdas:
        if not 0 < value < float("inf"):
            raise UserError(f"--lambdas {value}: a power must be a finite number above 0")
    return args


def main() -> int:
    try:
        args = parse_arguments()
        curves = gradient_curves(args.lambdas)
        try:
            draw_gradients(curves, Path(args.output))
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--output {args.output!r} can't be written: {reason}") from error
    except UserError as error:
        print(f"plot_gradients.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: equations and autograd differ by {max_deviation(curves):.1e} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
