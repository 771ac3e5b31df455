#!/usr/bin/env python
"""Time and memory of a comparison of two runs, on drawn results of the size of COCO's val2017.

Two runs of 5,000 images with 100 detections each, 80 classes. Drawing the case is not timed.

python tools/benchmark_comparison.py --output output/benchmark_comparison.json
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_evaluation import draw_case
from benchmarking import in_own_process, report

from iou_balanced_d2.analysis.comparison import compare_sides


def write_case(folder: Path, *case: int) -> None:
    """Ground truth and two files of detections, the second of scores with some more noise."""
    content, detections = draw_case(*case)
    (folder / "ground_truth.json").write_text(json.dumps(content))
    rng = np.random.default_rng(1)
    for name, noise in (("a", 0.0), ("b", 0.05)):
        drawn = rng.normal(0, noise, len(detections))
        rows = [{**d, "score": d["score"] + x} for d, x in zip(detections, drawn, strict=True)]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def measure(folder: str, resamples: int) -> dict[str, Any]:
    """Seconds and peak of resident memory of one comparison; in a process of its own."""
    sides = {name: [f"{folder}/{name}.json"] for name in ("a", "b")}
    truth = {"drawn": f"{folder}/ground_truth.json"}
    start = time.perf_counter()
    comparison = compare_sides(sides, ground_truth=truth, resamples=resamples)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime  # a busy machine takes longer, but does not compute longer
    memory, d = used.ru_maxrss / 2**10, comparison.differences["b"][0]
    return {
        "resamples": resamples,
        "s": seconds,
        "CPU s": cpu,
        "MiB": memory,
        "AP": d.value,
        "p": d.p,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="in each image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--output", help="JSON file of the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_case(Path(folder), args.images, args.detections, args.classes)
        # The first row is nearly all matching.
        numbers = sorted({min(100, args.resamples), args.resamples})
        rows = [in_own_process(measure, folder, n) for n in numbers]
    title = f"Two runs on {args.images} images x {args.detections} boxes, {args.classes} classes"
    report(title, rows, "cpu", args.output)


if __name__ == "__main__":
    main()
