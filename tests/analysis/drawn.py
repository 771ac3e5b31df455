"""Drawn test sets and detectors whose AP can be turned up and down, for comparisons."""

import json

import numpy as np

from ..evaluation.by_pycocotools import prepare_ground_truth
from ..evaluation.synthetic import coco_of, detections_of


def draw_truth(rng, num_images, num_classes=2, share_crowd=0.0):
    """Ground truth with up to four objects an image."""
    rows = []
    for image in range(1, num_images + 1):
        for _ in range(rng.integers(0, 5)):
            size = rng.uniform(20, 120, 2)
            box = [*rng.uniform(0, 150, 2), *size]
            flags = {"iscrowd": int(rng.random() < share_crowd)}
            rows.append((image, int(rng.integers(1, num_classes + 1)), box, flags))
    return coco_of(rows, num_images=num_images, num_classes=num_classes)


def draw_detections(rng, coco, noise=0.08, num_wrong=1):
    """One run's: each object found once with noise, and wrong boxes; no two scores are equal."""
    num_classes = len(coco.cats)
    rows = []
    for a in coco.dataset["annotations"]:
        _, _, w, h = a["bbox"]
        box = np.array(a["bbox"]) + rng.normal(0, noise, 4) * [w, h, w, h]
        rows.append((a["image_id"], a["category_id"], box.clip(1).tolist(), rng.beta(4, 2)))
    for image in coco.imgs:
        for _ in range(rng.integers(0, num_wrong + 1)):
            box = [*rng.uniform(0, 150, 2), *rng.uniform(20, 120, 2)]
            rows.append((image, int(rng.integers(1, num_classes + 1)), box, rng.beta(2, 4)))
    return detections_of(rows)


def duplicated(coco, detections, times):
    """The data set with each image repeated so often, literally; ids keep the images' order."""
    annotations, found = [], []
    copies = [(i, c) for i, n in zip(sorted(coco.imgs), times, strict=True) for c in range(n)]
    images = [{**coco.imgs[i], "id": number} for number, (i, _) in enumerate(copies, start=1)]
    for number, (image, _) in enumerate(copies, start=1):
        for rows, into in ((coco.dataset["annotations"], annotations), (detections, found)):
            into += [{**row, "image_id": number} for row in rows if row["image_id"] == image]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    again = coco_of([])
    again.dataset.update(
        images=images, annotations=annotations, categories=coco.dataset["categories"]
    )
    prepare_ground_truth(again, "ignore")
    return again, found


def write_run(folder, name, detections):
    """A run directory without config: ground truth is given by hand."""
    path = folder / "inference" / name
    path.mkdir(parents=True)
    (path / "coco_instances_results.json").write_text(json.dumps(detections))
    return folder
