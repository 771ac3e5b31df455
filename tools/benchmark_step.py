#!/usr/bin/env python
"""Time and memory of a whole training step, and time of inference, side by side.

RetinaNet-R50-FPN with random weights, as detectron2's RetinaNet and as IoUBalancedRetinaNet.

python tools/benchmark_step.py --output output/benchmark_step.json
"""

import argparse
import statistics
from typing import Any

from iou_balanced_d2.engine import load_config
from iou_balanced_d2.model_zoo import get_config_file

# isort: split
import torch
from benchmarking import in_own_process, median_ratio, peak_extra_bytes, report, time_side_by_side
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
        self.batch = [self._image(args.height, args.width) for _ in range(args.num_images)]

    @staticmethod
    def _image(height: int, width: int) -> dict[str, Any]:
        corner = torch.rand(7, 2) * torch.tensor([width, height]) * 0.6
        boxes = torch.cat([corner, corner + 20 + torch.rand(7, 2) * height * 0.4], dim=1)
        instances = Instances((height, width), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.randint(80, (7,))
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

    @torch.no_grad()
    def infer(self) -> None:
        """Detections of the first image."""
        self.model.eval()
        self.model(self.batch[:1])


def memory_of(name: str, args: Any) -> int:
    """Peak of the second training step; in a process of its own."""
    detector = Detector(DETECTORS[name], args)
    detector.train()
    detector.optimizer.zero_grad()
    return peak_extra_bytes(detector.train, args.device)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--num-images", type=int, default=2)
    parser.add_argument("--height", type=int, default=800 if on_gpu else 480)
    parser.add_argument("--width", type=int, default=1333 if on_gpu else 640)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--output", help="JSON file of the figures")
    args = parser.parse_args()
    peaks = {name: in_own_process(memory_of, name, args) / 2**20 for name in DETECTORS}
    detectors = {name: Detector(arch, args) for name, arch in DETECTORS.items()}
    rows = []
    for what in ("train", "infer"):
        steps = {name: getattr(detector, what) for name, detector in detectors.items()}
        seconds = time_side_by_side(steps, args.device, args.repeats)
        row: dict[str, Any] = {"step": what}
        row |= {f"{name} s": statistics.median(values) for name, values in seconds.items()}
        row["ours / detectron2"] = median_ratio(seconds["ours"], seconds["detectron2"])
        if what == "train":
            row |= {f"{name} MiB": value for name, value in peaks.items()}
            row["memory: ours / detectron2"] = peaks["ours"] / peaks["detectron2"]
        rows.append(row)
    size = f"{args.num_images} images of {args.height}x{args.width}"
    report(f"RetinaNet-R50-FPN, {size}", rows, args.device, args.output)


if __name__ == "__main__":
    main()
