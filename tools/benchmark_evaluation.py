#!/usr/bin/env python
"""Time and memory of the evaluator beside pycocotools' COCOeval, on drawn results.

The size of COCO's val2017 with 100 detections in each image: 5,000 images, 80 classes, 7 objects an
image. Each runs in a process of its own, which is also how memory can be told.

python tools/benchmark_evaluation.py --output output/benchmark_evaluation.json
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import in_own_process, peak_extra_bytes, report
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_balanced_d2.evaluation import coco_metrics, evaluate_boxes
from iou_balanced_d2.evaluation.detections import make_detections, read_ground_truth

OBJECTS_PER_IMAGE = 7
HEIGHT, WIDTH = 480, 640


def draw_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 4) XYWH, of all of COCO's ranges of size."""
    size = np.exp(rng.uniform(np.log(8), np.log(400), (n, 2)))
    return np.concatenate([rng.uniform(0, (WIDTH, HEIGHT), (n, 2)), size], axis=1)


def draw_case(num_images: int, num_dets: int, num_classes: int) -> tuple[dict[str, Any], list[Any]]:
    """Ground truth and detections, of which a third lie near an object of their class."""
    rng = np.random.default_rng(0)
    objects: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image in range(1, num_images + 1):
        boxes = draw_boxes(rng, OBJECTS_PER_IMAGE)
        # As in photos: few classes in an image.
        classes = rng.integers(1, num_classes + 1, 3)[rng.integers(3, size=OBJECTS_PER_IMAGE)]
        for box, c in zip(boxes.tolist(), classes.tolist(), strict=True):
            row = {"id": len(objects) + 1, "image_id": image, "category_id": c, "bbox": box}
            area = box[2] * box[3]
            objects.append({**row, "area": area, "iscrowd": int(rng.random() < 0.01)})
        near = rng.integers(OBJECTS_PER_IMAGE, size=num_dets)
        hit = rng.random(num_dets) < 0.35
        found = boxes[near] + rng.normal(0, 0.1, (num_dets, 4)) * boxes[near][:, [2, 3, 2, 3]]
        found = np.where(hit[:, None], found, draw_boxes(rng, num_dets)).clip(1)
        guess = np.where(hit, classes[near], rng.integers(1, num_classes + 1, num_dets))
        scores = rng.beta(1 + 2 * hit, 4)
        for box, c, s in zip(found.tolist(), guess.tolist(), scores.tolist(), strict=True):
            detections.append({"image_id": image, "category_id": c, "bbox": box, "score": s})
    ground_truth = {
        "info": {},
        "images": [
            {"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"}
            for i in range(1, num_images + 1)
        ],
        "annotations": objects,
        "categories": [{"id": i, "name": str(i)} for i in range(1, num_classes + 1)],
    }
    return ground_truth, detections


def evaluate_here(file: str, rows: list[Any]) -> dict[str, float]:
    ground_truth = read_ground_truth(file)
    counts = evaluate_boxes(ground_truth, make_detections(rows, ground_truth, "drawn"))
    return coco_metrics(**counts, class_names=ground_truth.classes)


def evaluate_by_pycocotools(file: str, rows: list[Any]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(file)
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), 100 * evaluation.stats[:3], strict=True))


EVALUATORS = {"BoxEvaluator": evaluate_here, "pycocotools": evaluate_by_pycocotools}


def measure(name: str, *case: int) -> dict[str, Any]:
    """Seconds, peak of memory, and AP to compare; in a process of its own."""
    content, detections = draw_case(*case)
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ground_truth.json")
        file.write_text(json.dumps(content))
        start = time.perf_counter()
        peak = peak_extra_bytes(
            lambda: metrics.update(EVALUATORS[name](str(file), detections)), "cpu"
        )
        seconds = time.perf_counter() - start
    return {"s": seconds, "MiB": peak / 2**20, "AP": metrics["AP"], "AP75": metrics["AP75"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="in each image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--output", help="JSON file of the figures")
    args = parser.parse_args()
    case = (args.images, args.detections, args.classes)
    rows = [{"evaluator": name, **in_own_process(measure, name, *case)} for name in EVALUATORS]
    title = f"Evaluation of {args.images} images x {args.detections} boxes, {args.classes} classes"
    report(title, rows, "cpu", args.output)


if __name__ == "__main__":
    main()
