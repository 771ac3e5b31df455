"""PASCAL VOC's average precision, at any IoU threshold.

Matching is the devkit's: the detections of a class, best score first, each claim the object of
their class and image with the largest IoU, if that reaches the threshold. The first claim of an
object is right, every later one wrong; claims of a difficult object do not count. IoU is that of
boxes with continuous coordinates. (The devkit's boxes are of whole pixels, both ends included,
hence its +1; converted to COCO form they are the same boxes with the same IoU.)

Letters: T IoU thresholds, K classes, D detections and G objects of one class.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO

from .metrics import IOU_PERCENT, IOU_THRESHOLDS

Array = NDArray[Any]
Annotations = Sequence[dict[str, Any]]


class VocAP(NamedTuple):
    """AP between 0 and 1, (T, K) float64 each; NaN for classes without objects.

    Attributes:
        eleven_point: mean of the precision at recall 0, .1, ... 1 (VOC 2007).
        area: area under the precision's envelope (VOC 2010 and later).
    """

    eleven_point: Array
    area: Array


def voc_average_precision(
    coco: COCO,
    results: Annotations,
    *,
    img_ids: Iterable[Any] | None = None,
    iou_thresholds: Sequence[float] | Array = IOU_THRESHOLDS,
) -> VocAP:
    """AP of each class at each threshold, with all detections there are.

    Args:
        coco: ground truth; objects with "difficult" set, and crowds, are ignored.
        results: detections in COCO's format; those of equal score in the order of this list.
        img_ids: the images to evaluate; None for all.
        iou_thresholds: T thresholds; an IoU equal to one reaches it.

    Returns:
        AP by threshold and class, classes in the order of their category ids.
    """
    images = set(coco.imgs if img_ids is None else img_ids)
    objects = _by_category(coco.dataset["annotations"], images)
    detections = _by_category(results, images)
    categories = sorted(coco.cats)
    ap = np.array([_class_ap(detections[c], objects[c], iou_thresholds) for c in categories])
    ap = ap.reshape(len(categories), len(iou_thresholds), 2)
    return VocAP(eleven_point=ap[..., 0].T, area=ap[..., 1].T)


def voc_metrics(ap: VocAP, class_names: Sequence[str]) -> dict[str, float]:
    """VOC's AP by name, in percent.

    Args:
        ap: at the thresholds .50 to .95.
        class_names: K names.

    Returns:
        for "11pt" and "area": AP_11pt (mean over thresholds and classes), AP50_11pt, ...
        AP95_11pt (mean over classes), and AP50_11pt-<class>.
    """
    metrics = {}
    for kind, values in (("11pt", ap.eleven_point), ("area", ap.area)):
        defined = values[:, ~np.isnan(values[0])]
        means = [float(100 * x.mean()) if x.size else float("nan") for x in defined]
        metrics[f"AP_{kind}"] = float(np.mean(means))
        metrics |= {f"AP{t}_{kind}": m for t, m in zip(IOU_PERCENT, means, strict=True)}
    for kind, values in (("11pt", ap.eleven_point), ("area", ap.area)):
        each = zip(class_names, values[0], strict=True)
        metrics |= {f"AP50_{kind}-{name}": float(100 * x) for name, x in each}
    return metrics


def _by_category(annotations: Annotations, images: set[Any]) -> dict[Any, list[dict[str, Any]]]:
    """The annotations of the images, or the detections, of each category."""
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if annotation["image_id"] in images:
            found[annotation["category_id"]].append(annotation)
    return found


def _class_ap(
    detections: Annotations, objects: Annotations, thresholds: Sequence[float] | Array
) -> Array:
    """(T, 2) AP of one class by 11 points and by area."""
    difficult = np.array([bool(o.get("difficult") or o.get("iscrowd")) for o in objects], bool)
    num_objects = int((~difficult).sum())
    if num_objects == 0:
        return np.full((len(thresholds), 2), np.nan)
    order = np.argsort([-d["score"] for d in detections], kind="stable")
    iou, claimed = _claims([detections[i] for i in order], objects)
    ap = []
    for threshold in thresholds:
        right = _right_or_wrong(iou >= threshold, claimed, difficult)
        hits = right.cumsum()
        precision = hits / np.arange(1, len(hits) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        # In whole numbers: a recall of 3/10 does reach 0.3, which floats miss.
        reached = (10 * hits[:, None] >= np.arange(11) * num_objects).T
        eleven = sum(precision[r].max() for r in reached if r.any()) / 11
        # Recall grows by 1 / num_objects at each hit.
        ap.append((eleven, envelope[right].sum() / num_objects))
    return np.array(ap)


def _claims(detections: Annotations, objects: Annotations) -> tuple[Array, Array]:
    """The largest IoU (D,) of each detection, and the row (D,) of that object; -1 for none."""
    iou, claimed = np.zeros(len(detections)), np.full(len(detections), -1)
    rows_of: dict[Any, list[int]] = defaultdict(list)
    for row, o in enumerate(objects):
        rows_of[o["image_id"]].append(row)
    detected: dict[Any, list[int]] = defaultdict(list)
    for row, d in enumerate(detections):
        detected[d["image_id"]].append(row)
    for image in detected.keys() & rows_of.keys():
        mine, theirs = detected[image], rows_of[image]
        boxes = [objects[i]["bbox"] for i in theirs]
        pairs = mask.iou([detections[i]["bbox"] for i in mine], boxes, [0] * len(theirs))
        iou[mine] = pairs.max(axis=1)
        claimed[mine] = np.array(theirs)[pairs.argmax(axis=1)]
    return iou, claimed


def _right_or_wrong(reached: Array, claimed: Array, difficult: Array) -> Array:
    """Whether each detection that counts is right (bool); those on difficult objects are left out.

    Args:
        reached: (D,) bool, whether the IoU with the claimed object reaches the threshold.
        claimed: (D,) rows of objects.
        difficult: (G,) bool.
    """
    ignored = reached & difficult[claimed]
    valid = np.flatnonzero(reached & ~ignored)
    right = np.zeros(len(reached), bool)
    right[valid[np.unique(claimed[valid], return_index=True)[1]]] = True
    return right[~ignored]
