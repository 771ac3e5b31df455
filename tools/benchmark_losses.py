#!/usr/bin/env python
"""Time and memory of a dense detector's losses, forward and backward, side by side.

Compared on the same predictions, of a RetinaNet at 800x1333 (padded to 800x1344, 201,600 anchors):
RetinaNet.losses(), the plain losses of detectron2, and IoUBalancedLoss, both losses balanced.

The first row is measured as the machine is, the others beside 1, 2 and 4 processes of two
threads each that this script starts and ends.

python tools/benchmark_losses.py --output output/benchmark_losses.json
"""

import argparse
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import IoUBalancedLoss

# isort: split
import torch
from benchmarking import compare, in_own_process, peak_extra_bytes, report
from detectron2.modeling import RetinaNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor

# Anchors of each level: 9 for each cell of the strides 8 to 128 of an 800x1344 image.
LEVEL_SIZES = tuple(9 * h * w for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)))
W_LOC, BETA = 3.049, 0.11


class Case:
    """One set of predictions and targets, and the step of each implementation on it."""

    def __init__(self, num_images: int, num_classes: int, num_pos: int, device: str):
        self.num_classes, self.device = num_classes, device
        rng = torch.Generator().manual_seed(0)
        num_anchors = sum(LEVEL_SIZES)
        corner = torch.rand(num_anchors, 2, generator=rng) * 700
        flat = torch.cat([corner, corner + 32 + torch.rand(num_anchors, 2, generator=rng) * 90], 1)
        gt = flat + (torch.rand(num_anchors, 4, generator=rng) - 0.5) * 16
        labels = torch.full((num_images, num_anchors), num_classes)
        chosen = torch.randperm(labels.numel(), generator=rng)[: 2 * num_pos]
        labels.view(-1)[chosen[:num_pos]] = torch.randint(num_classes, (num_pos,), generator=rng)
        labels.view(-1)[chosen[num_pos:]] = -1  # about as many ignored as positive
        self.anchors = [Boxes(x.to(device)) for x in flat.split(LEVEL_SIZES)]
        self.labels = list(labels.to(device))
        self.gt = [gt.to(device)] * num_images
        # The head's bias at the start: all scores at 0.01, give or take.
        self.logits = [
            torch.randn(num_images, s, num_classes, device=device).sub_(4.6).requires_grad_()
            for s in LEVEL_SIZES
        ]
        self.deltas = [
            (torch.randn(num_images, s, 4, device=device) * 0.1).requires_grad_()
            for s in LEVEL_SIZES
        ]
        self.transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
        self.ours_module = IoUBalancedLoss(
            num_classes=num_classes,
            box2box_transform=self.transform,
            options=LossOptions(loc_weight=W_LOC),
        ).to(device)
        self.stock_module = self._stock()

    def _stock(self) -> SimpleNamespace:
        """What RetinaNet.losses() reads of a RetinaNet."""
        stock = SimpleNamespace(
            num_classes=self.num_classes,
            box2box_transform=self.transform,
            focal_loss_alpha=0.25,
            focal_loss_gamma=2.0,
            smooth_l1_beta=BETA,
            box_reg_loss_type="smooth_l1",
        )
        stock._ema_update = functools.partial(RetinaNet._ema_update, stock)
        return stock

    def _step(self, losses: Callable[..., dict[str, Tensor]]) -> None:
        """Losses, and their gradients with respect to the predictions, handed over and dropped."""
        found = losses(self.anchors, self.logits, self.labels, self.deltas, self.gt)
        torch.autograd.grad(sum(found.values()), [*self.logits, *self.deltas])

    def detectron2(self) -> None:
        """The plain losses as detectron2 computes them."""
        self._step(functools.partial(RetinaNet.losses, self.stock_module))

    def ours(self) -> None:
        """Both IoU-balanced losses as this project computes them."""
        self._step(self.ours_module)


def memory_of(name: str, shape: tuple[Any, ...]) -> int:
    """Peak of one implementation's second step; in a process of its own."""
    with EventStorage(0):
        step = getattr(Case(*shape), name)
        step()
        return peak_extra_bytes(step, shape[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--positives", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=4, help="rounds that are counted")
    parser.add_argument("--busy", type=int, nargs="*", default=[1, 2, 4], help="busy processes")
    parser.add_argument("--output", help="JSON file of the figures")
    args = parser.parse_args()
    shape = (args.images, args.classes, args.positives, args.device)
    case = Case(*shape)
    steps = {name: getattr(case, name) for name in ("detectron2", "ours")}
    memory = functools.partial(in_own_process, memory_of, shape=shape)
    with EventStorage(0):
        rows = [compare(steps, args.device, args.repeats, memory=memory)]
        rows += [compare(steps, args.device, args.repeats, num_busy=n) for n in args.busy]
    title = (
        f"Losses, forward + backward, N = {args.images}, K = {args.classes}, P = {args.positives}"
    )
    report(title, rows, args.device, args.output)


if __name__ == "__main__":
    main()
