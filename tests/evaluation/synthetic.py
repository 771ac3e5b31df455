"""Random ground truth and detections, and ground truth in memory."""

import numpy as np
from pycocotools.coco import COCO

from iou_balanced_d2.evaluation.ground_truth import prepare_ground_truth


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
