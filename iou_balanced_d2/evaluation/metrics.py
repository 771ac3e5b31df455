"""Named numbers and tables from AP and recall.

Letters: T IoU thresholds, K classes, A ranges of area, M limits of detections.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from .detections import Array

# COCO's thresholds, by its own expression, and in hundredths, as the metrics' names have them.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
IOU_PERCENT = tuple(range(50, 100, 5))
AREAS = {"s": "small", "m": "medium", "l": "large"}


def coco_metrics(
    ap: Array, recall: Array, class_names: Sequence[str], max_dets: Sequence[int] = (1, 10, 100)
) -> dict[str, float]:
    """AP and AR by their names, in percent; NaN where there is no object to find.

    Args:
        ap: (T, K, A), NaN for undefined; see :func:`evaluate_boxes`.
        recall: (T, K, A, M), likewise.
        class_names: K names.
        max_dets: M limits of detections an image.

    Returns:
        in this order: AP, AP50, AP55, ... AP95, APs, APm, APl, AR1, AR10, AR100 (named after the
        limits), ARs, ARm, ARl, and AP-<class> for each class.
    """
    overall = ap[..., 0]
    metrics = ap_summary(overall)
    metrics |= {f"AP{a}": percent(ap[..., i]) for i, a in enumerate(AREAS, start=1)}
    metrics |= {f"AR{m}": percent(recall[..., 0, i]) for i, m in enumerate(max_dets)}
    metrics |= {f"AR{a}": percent(recall[..., i, -1]) for i, a in enumerate(AREAS, start=1)}
    metrics |= {f"AP-{name}": percent(overall[:, k]) for k, name in enumerate(class_names)}
    return metrics


def ap_summary(aps: Array) -> dict[str, float]:
    """AP (the mean) and AP50, ... AP95 in percent from (T, K); NaN without any object."""
    of_thresholds = zip(IOU_PERCENT, aps, strict=True)
    return {"AP": percent(aps)} | {f"AP{t}": percent(ap) for t, ap in of_thresholds}


def percent(values: Array) -> float:
    """Mean of the defined values (not NaN) times 100; NaN if there are none."""
    defined = values[~np.isnan(values)]
    return float(100 * defined.mean()) if defined.size else float("nan")


def threshold_table(ap: Array) -> str:
    """AP over IoU thresholds, for all objects and for each range of area."""
    parts = {name: ap[..., i] for i, name in enumerate(("all", *AREAS.values()))}
    rows = [[name, percent(p), *map(percent, p)] for name, p in parts.items()]
    return _table(rows, ["AP of objects", ".50:.95", *(f".{t}" for t in IOU_PERCENT)])


def class_table(ap: Array, class_names: Sequence[str], num_objects: Sequence[int]) -> str:
    """One row a class: how many objects there are, and AP at the usual thresholds."""
    rows = [
        [name, n, percent(ap[:, k, 0]), *(100 * ap[[0, 5, 8], k, 0])]
        for k, (name, n) in enumerate(zip(class_names, num_objects, strict=True))
    ]
    return _table(rows, ["class", "objects", "AP", "AP50", "AP75", "AP90"])


def recall_table(metrics: Mapping[str, float]) -> str:
    """AR by limit of detections and by range of area."""
    found = {name: x for name, x in metrics.items() if name.startswith("AR") and "-" not in name}
    return _table([["all classes", *found.values()]], ["", *found])


def voc_table(metrics: Mapping[str, float]) -> str:
    """VOC's two kinds of AP over IoU thresholds."""
    rows = [
        [f"VOC AP, {text}", *(metrics[f"AP{t}_{kind}"] for t in ("", *IOU_PERCENT))]
        for kind, text in (("11pt", "11 points"), ("area", "area"))
    ]
    return _table(rows, ["", ".50:.95", *(f".{t}" for t in IOU_PERCENT)])


def _table(rows: list[list[Any]], headers: list[str]) -> str:
    """A table whose first column holds names, even if a class is named "1"."""
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".2f", disable_numparse=[0])
