"""Random ground truth and detections, ground truth in memory, and matching in plain loops."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torchvision.ops import box_iou

from iou_balanced_d2.evaluation.detections import make_detections, read_ground_truth
from iou_balanced_d2.evaluation.matching import IGNORED, RIGHT, WRONG

from .by_pycocotools import prepare_ground_truth


def coco_of(annotations, *, num_images=1, num_classes=1, difficult="ignore"):
    """A COCO of annotations given as (image, class, XYWH box, further fields)."""
    rows = [
        {"id": i, "image_id": image, "category_id": category, "bbox": list(box), **fields}
        for i, (image, category, box, fields) in enumerate(annotations, start=1)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 300, "width": 300}
                   for i in range(1, num_images + 1)],
        "annotations": rows,
        "categories": [{"id": i, "name": f"class{i}"} for i in range(1, num_classes + 1)],
    }  # fmt: skip
    prepare_ground_truth(coco, difficult)
    return coco


def detections_of(rows):
    """COCO results of (image, class, XYWH box, score)."""
    return [
        {"image_id": image, "category_id": category, "bbox": list(box), "score": score}
        for image, category, box, score in rows
    ]


def random_boxes(rng, n):
    corner, size = rng.uniform(0, 200, (n, 2)), rng.uniform(4, 150, (n, 2))
    return np.concatenate([corner, size], axis=1)


def random_case(seed, *, difficult="ignore", share_difficult=0.0, share_crowd=0.15, decimals=1):
    """(ground truth, detections): empty images, ties, crowds, more than 100 boxes in an image."""
    rng = np.random.default_rng(seed)
    annotations, rows = [], []
    for image in range(1, 13):
        for category in range(1, 5):  # no object of class 4
            n = 0 if category == 4 or image % 5 == 0 else rng.integers(0, 5)
            boxes = random_boxes(rng, n)
            for box in boxes:
                flags = {
                    "iscrowd": int(rng.random() < share_crowd),
                    "difficult": int(rng.random() < share_difficult),
                }
                annotations.append((image, category, box.tolist(), flags))
            if image % 7 == 0:
                continue
            m = 130 if (image, category) == (3, 1) else rng.integers(0, 12)
            found = random_boxes(rng, m)
            if n:
                near = boxes[rng.integers(n, size=m)] + rng.normal(0, 4, (m, 4))
                found = np.where(rng.random((m, 1)) < 0.8, near, found).clip(1)
            scores = rng.random(m).round(decimals)  # ties
            rows += [(image, category, b.tolist(), float(s))
                     for b, s in zip(found, scores, strict=True)]  # fmt: skip
    coco = coco_of(annotations, num_images=12, num_classes=4, difficult=difficult)
    return coco, detections_of(rows)


def arrays_of(coco, rows, difficult="ignore", **kwargs):
    """(GroundTruth, Detections) of a COCO, or of what its file holds, and COCO results."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gt.json")
        file.write_text(json.dumps(getattr(coco, "dataset", coco)))
        ground_truth = read_ground_truth(str(file), difficult)
    # As from a file: without NumPy's numbers.
    return ground_truth, make_detections(
        json.loads(json.dumps(rows)), ground_truth, "here", **kwargs
    )


def one_by_one(ground_truth, detections, threshold):
    """COCO's rules in plain loops: outcome and object of each detection."""
    boxes, gts = (torch.from_numpy(x) for x in (detections.boxes, ground_truth.boxes))
    iou = box_iou(boxes, gts).numpy()
    over_own = iou * 0
    for d, box in enumerate(detections.boxes):
        for g, gt in enumerate(ground_truth.boxes):
            w = min(box[2], gt[2]) - max(box[0], gt[0])
            h = min(box[3], gt[3]) - max(box[1], gt[1])
            over_own[d, g] = max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))
    iou = np.where(ground_truth.crowd, over_own, iou)
    taken, outcome, matched = set(), [], []
    for d in range(len(detections)):
        best = (-1, False, 0.0)
        for g in range(len(ground_truth.boxes)):
            ignored = bool(ground_truth.ignored[g])
            if ground_truth.group[g] != detections.group[d] or iou[d, g] < threshold:
                continue
            if g in taken and not ignored:
                continue
            if best[0] < 0 or (ignored, -iou[d, g]) <= (best[1], -best[2]):
                best = (g, ignored, iou[d, g])
        taken.add(best[0])
        matched.append(best[0])
        outcome.append(IGNORED if best[1] else RIGHT if best[0] >= 0 else WRONG)
    same = ground_truth.group == detections.group[:, None]
    return np.array(outcome), np.array(matched), np.where(same, iou, 0)
