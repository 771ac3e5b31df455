#!/usr/bin/env python
"""Time of a training step of SSD300-VGG16, beside torchvision's, with the same weights and batch.

python projects/SSD/benchmark_step.py --output output/benchmark_ssd.json
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from iou_balanced_d2.engine import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from benchmarking import median_ratio, report, time_side_by_side  # noqa: E402

CONFIG = ROOT / "projects/SSD/configs/COCO-Detection/ssd300_VGG16_iou_balanced.yaml"
SIZE = 300


def detectors(device: str) -> dict[str, torch.nn.Module]:
    """Torchvision's SSD300, ours with the plain losses and with the IoU-balanced ones."""
    torch.manual_seed(0)
    theirs = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=81, trainable_backbone_layers=5
    )
    models = {"torchvision": theirs.to(device).train()}
    for name, architecture in (("SSD", "SSD"), ("IoU-balanced", "IoUBalancedSSD")):
        options = ["MODEL.META_ARCHITECTURE", architecture, "MODEL.DEVICE", device]
        models[name] = build_model(load_config(str(CONFIG), options)).train()
        models[name].load_state_dict(theirs.state_dict())
    return models


def images(num_images: int, device: str) -> list[dict[str, Any]]:
    """Random images with 7 boxes each, in detectron2's form."""
    inputs = []
    for _ in range(num_images):
        corner = torch.rand(7, 2) * 0.6 * SIZE
        boxes = torch.cat([corner, corner + 20 + torch.rand(7, 2) * 0.3 * SIZE], dim=1)
        instances = Instances((SIZE, SIZE), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.randint(80, (7,))
        image = torch.randint(0, 255, (3, SIZE, SIZE), dtype=torch.uint8, device=device)
        inputs.append({"image": image, "instances": instances})
    return inputs


def step_of(name: str, model: torch.nn.Module, inputs: list[dict[str, Any]]) -> Callable[[], None]:
    """Forward and backward; torchvision gets the same batch in its own form."""
    device = inputs[0]["image"].device
    pixels = [x["image"].float() / 255 for x in inputs]
    targets = [
        {
            "boxes": x["instances"].gt_boxes.tensor.to(device),
            "labels": x["instances"].gt_classes.to(device) + 1,
        }
        for x in inputs
    ]

    def step() -> None:
        with EventStorage():
            losses = model(pixels, targets) if name == "torchvision" else model(inputs)
        model.zero_grad()
        sum(losses.values()).backward()

    return step


def main() -> None:
    """Command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--num-images", type=int, default=32 if on_gpu else 2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--output", help="JSON file of the figures")
    args = parser.parse_args()
    inputs = images(args.num_images, args.device)
    steps = {name: step_of(name, m, inputs) for name, m in detectors(args.device).items()}
    seconds = time_side_by_side(steps, args.device, args.repeats)
    rows = [
        {
            "detector": name,
            "s": statistics.median(values),
            "/ torchvision": median_ratio(values, seconds["torchvision"]),
        }
        for name, values in seconds.items()
    ]
    title = f"SSD300-VGG16, forward + backward, {args.num_images} images"
    report(title, rows, args.device, args.output)


if __name__ == "__main__":
    main()
