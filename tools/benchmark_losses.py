#!/usr/bin/env python
"""Time and memory of a dense detector's losses, forward and backward, side by side.

Compared on the same predictions, of a RetinaNet at 800x1333 (padded to 800x1344, 201,600 anchors):

    detectron2  RetinaNet.losses(), the plain losses
    dense       the IoU-balanced losses as the paper's author computes them: a weight for every
                anchor and class, boxes decoded and encoded for every anchor
    ours        IoUBalancedLoss, both losses balanced
    floor       reading the logits once and writing their gradient once, at copy speed

The first row is measured as the machine is, the others beside 1, 2 and 4 processes of two
threads each that this script starts and ends.

python tools/benchmark_losses.py --output output/benchmark_losses.json
"""

import argparse
import functools
import statistics
from types import SimpleNamespace
from typing import Any

from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import IoUBalancedLoss

# isort: split
import torch
from benchmarking import (
    busy_processes,
    compare_times,
    in_own_process,
    peak_extra_bytes,
    report,
    time_side_by_side,
)
from detectron2.modeling import RetinaNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss_jit, smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

# Anchors of each level: 9 for each cell of the strides 8 to 128 of an 800x1344 image.
LEVEL_SIZES = tuple(9 * h * w for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)))
ETA, LAMBDA, W_LOC, BETA = 1.5, 1.5, 3.049, 0.11
NAMES = ("detectron2", "dense", "ours", "floor")


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
        self.buffers = [torch.zeros_like(x) for x in self.logits]
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

    def _backward(self, losses: dict[str, Tensor]) -> None:
        """Gradients with respect to the predictions, handed over and dropped."""
        torch.autograd.grad(sum(losses.values()), [*self.logits, *self.deltas])

    def detectron2(self) -> None:
        """The plain losses as detectron2 computes them."""
        args = (self.anchors, self.logits, self.labels, self.deltas, self.gt)
        self._backward(RetinaNet.losses(self.stock_module, *args))

    def ours(self) -> None:
        """Both IoU-balanced losses as this project computes them."""
        args = (self.anchors, self.logits, self.labels, self.deltas, self.gt)
        self._backward(self.ours_module(*args))

    def dense(self) -> None:
        """Both IoU-balanced losses as the author computes them."""
        self._backward(dense_losses(self))

    def floor(self) -> None:
        """One read and one write of the logits' size."""
        for x, buffer in zip(self.logits, self.buffers, strict=True):
            buffer.copy_(x.detach())


def dense_losses(case: Case) -> dict[str, Tensor]:
    """Level by level, everything for all anchors, as in the paper's equations read literally."""
    labels, gt = torch.stack(case.labels), torch.stack(case.gt)
    start, loss_cls, loss_box = 0, 0.0, 0.0
    for anchors, logits, deltas in zip(case.anchors, case.logits, case.deltas, strict=True):
        part = slice(start, start + len(anchors))
        start += len(anchors)
        label, box = labels[:, part].reshape(-1), gt[:, part].reshape(-1, 4)
        anchor = anchors.tensor.repeat(len(labels), 1)
        delta = deltas.reshape(-1, 4)
        target = F.one_hot(label.clamp(min=0), case.num_classes + 1)[:, :-1].float()
        target = target * (label >= 0)[:, None]
        positive = target.sum(dim=1)
        with torch.no_grad():
            decoded = case.transform.apply_deltas(delta, anchor)
            iou = matched_pairwise_iou(Boxes(decoded), Boxes(box)).clamp(min=1e-6)
        focal = sigmoid_focal_loss_jit(
            logits.reshape(-1, case.num_classes), target, alpha=0.25, gamma=2.0
        )
        focal = focal * (label >= 0)[:, None]
        with torch.no_grad():
            powered = target * (iou**ETA)[:, None]
            total, balanced = (focal * target).sum(), (focal * powered).sum()
            weight = torch.where(target > 0, powered * (total / balanced.clamp(min=1e-9)), 1.0)
        loss_cls = loss_cls + (focal * weight).sum()
        encoded = case.transform.get_deltas(anchor, box)
        smooth = smooth_l1_loss(delta, encoded, beta=BETA, reduction="none")
        loss_box = loss_box + (smooth * (W_LOC * iou**LAMBDA * positive)[:, None]).sum()
    return {"loss_cls": loss_cls, "loss_box_reg": loss_box}


def memory_of(name: str, *case: Any) -> int:
    """Peak of one implementation's second step; in a process of its own."""
    with EventStorage(0):
        step = getattr(Case(*case), name)
        step()
        return peak_extra_bytes(step, case[-1])


def measure(case: Case, names: tuple[str, ...], args: Any) -> dict[str, list[float]]:
    """Seconds of each implementation, in turns."""
    with EventStorage(0):
        steps = {name: getattr(case, name) for name in names}
        return time_side_by_side(steps, args.device, args.repeats, warm_up=names == NAMES)


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
    seconds = measure(case, NAMES, args)
    mib = {name: in_own_process(memory_of, name, *shape) / 2**20 for name in NAMES[::2]}
    quiet = {
        **compare_times(seconds["ours"], seconds["detectron2"]),
        **{f"{name} ms": 1000 * statistics.median(seconds[name]) for name in ("dense", "floor")},
        **{f"{name} MiB": value for name, value in mib.items()},
        "memory: ours / detectron2": mib["ours"] / mib["detectron2"],
    }
    rows = [{"busy processes": 0, **quiet}]
    for number in args.busy:
        with busy_processes(number):
            seconds = measure(case, NAMES[::2], args)
        row = compare_times(seconds["ours"], seconds["detectron2"])
        rows.append({"busy processes": number, **row})
    title = (
        f"Losses, forward + backward, N = {args.images}, K = {args.classes}, P = {args.positives}"
    )
    report(title, rows, args.device, args.output)


if __name__ == "__main__":
    main()
