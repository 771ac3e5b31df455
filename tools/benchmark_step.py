#!/usr/bin/env python
"""Time and memory of a training step, of the labelling of its anchors, and of inference.

RetinaNet-R50-FPN with random weights, side by side as detectron2's RetinaNet and as
IoUBalancedRetinaNet; the training step also beside processes that keep the machine busy.

python tools/benchmark_step.py --output output/benchmark_step.json
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from iou_balanced_d2.engine import load_config
from iou_balanced_d2.model_zoo import get_config_file

# isort: split
import torch
from benchmarking import compare, in_own_process, peak_extra_bytes, report
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml"
DETECTORS = {"detectron2": "RetinaNet", "ours": "IoUBalancedRetinaNet"}


class Detector:
    """One detector, its optimizer and a batch, seeded alike."""

    def __init__(self, meta_architecture: str, args: Any):
        options = ["MODEL.META_ARCHITECTURE", meta_architecture, "MODEL.DEVICE", args.device]
        cfg = load_config(get_config_file(CONFIG), options)
        torch.manual_seed(0)
        self.model = build_model(cfg)
        self.optimizer = build_optimizer(cfg, self.model)
        size = (args.height, args.width)
        self.batch = [self._image(*size, args.objects) for _ in range(args.images)]
        self.instances = [x["instances"].to(args.device) for x in self.batch]
        strides = [8, 16, 32, 64, 128]
        levels = [torch.zeros(1, 1, *(-(-x // s) for x in size)) for s in strides]
        self.anchors = self.model.anchor_generator([x.to(args.device) for x in levels])

    @staticmethod
    def _image(height: int, width: int, num_objects: int) -> dict[str, Any]:
        corner = torch.rand(num_objects, 2) * torch.tensor([width, height]) * 0.6
        boxes = torch.cat([corner, corner + 20 + torch.rand(num_objects, 2) * height * 0.4], dim=1)
        instances = Instances((height, width), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.randint(80, (num_objects,))
        image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        return {"image": image, "instances": instances, "height": height, "width": width}

    def train(self) -> None:
        """One training step; the learning rate is 0, so that every step is the same."""
        self.model.train()
        with EventStorage(0):
            losses = self.model(self.batch)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()

    def label_anchors(self) -> None:
        """What a training step does first with the ground truth."""
        self.model.label_anchors(self.anchors, self.instances)

    @torch.no_grad()
    def infer(self) -> None:
        """Detections of the first image."""
        self.model.eval()
        self.model(self.batch[:1])


def memory_of(name: str, what: str, args: Any) -> int:
    """Peak of the second step, in bytes; in a process of its own."""
    detector = Detector(DETECTORS[name], args)
    step: Callable[[], None] = getattr(detector, what)
    step()
    detector.optimizer.zero_grad()
    return peak_extra_bytes(step, args.device)


def measure(detectors: dict[str, Detector], what: str, num_busy: int, args: Any) -> dict[str, Any]:
    """One row of the table; memory does not depend on how busy the machine is."""
    steps = {name: getattr(detector, what) for name, detector in detectors.items()}
    memory = None
    if what != "infer" and not num_busy:
        memory = partial(in_own_process, memory_of, what=what, args=args)
    row = compare(steps, args.device, args.repeats, num_busy=num_busy, memory=memory)
    return {"step": what, **row}


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--height", type=int, default=800 if on_gpu else 480)
    parser.add_argument("--width", type=int, default=1333 if on_gpu else 640)
    parser.add_argument("--objects", type=int, default=200, help="in each image")
    parser.add_argument("--repeats", type=int, default=2, help="rounds that are counted")
    parser.add_argument("--busy", type=int, nargs="*", default=[1], help="busy processes")
    parser.add_argument("--output", help="JSON file of the figures")
    args = parser.parse_args()
    cases = [(what, 0) for what in ("train", "label_anchors", "infer")]
    cases += [("train", number) for number in args.busy]
    detectors = {name: Detector(arch, args) for name, arch in DETECTORS.items()}
    rows = [measure(detectors, *case, args) for case in cases]
    size = f"{args.images} images of {args.height}x{args.width} with {args.objects} objects"
    report(f"RetinaNet-R50-FPN, {size}", rows, args.device, args.output)


if __name__ == "__main__":
    main()
