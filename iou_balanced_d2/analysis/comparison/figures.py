"""Figures of a comparison: AP over IoU with differences, and the curves of the trainings."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...evaluation.metrics import IOU_PERCENT, IOU_THRESHOLDS
from ..plots import label, new_figure, style
from .compare import Comparison

_THRESHOLDS = slice(1, 1 + len(IOU_PERCENT))  # of the metrics
_SMOOTH = 20  # points of a loss's curve that are averaged


def ap_over_iou(comparison: Comparison) -> Figure:
    """AP of each side over IoU thresholds, and beside it the differences with their intervals."""
    figure, axes = new_figure(11, 4.2, columns=2)
    left, right = axes[0]
    for i, side in enumerate(comparison.sides):
        left.plot(IOU_THRESHOLDS, side.mean()[_THRESHOLDS], label=label(side.name), **style(i))
        for run in side.values if len(side.values) > 1 else ():
            left.plot(IOU_THRESHOLDS, run[_THRESHOLDS], color=style(i)["color"], alpha=0.3, lw=0.8)
    count = len(comparison.differences)
    for i, (name, found) in enumerate(comparison.differences.items(), start=1):
        part = found[_THRESHOLDS]
        low = [d.value - d.low for d in part]
        high = [d.high - d.value for d in part]
        x = IOU_THRESHOLDS + 0.008 * (i - (count + 1) / 2)
        y = [d.value for d in part]
        right.errorbar(x, y, yerr=[low, high], label=label(name), capsize=3, **style(i))
    right.axhline(0, color="black", lw=1)
    left.set(title="AP over IoU", xlabel="IoU threshold", ylabel="AP (%)")
    first = label(comparison.sides[0].name)
    right.set(
        title=f"Difference from {first}, 95 % interval", xlabel="IoU threshold", ylabel="AP points"
    )
    left.legend()
    right.legend()
    return figure


def curves(comparison: Comparison) -> Figure:
    """Losses and AP during the trainings, of the runs that have kept their metrics."""
    names = {key: None for _, run in _runs(comparison) for key in run}
    losses = [key for key in names if not key.endswith("AP")]
    ordered = [*losses, *(key for key in names if key not in losses)]
    columns = min(len(ordered), 2)
    rows = -(-len(ordered) // columns)
    figure, panels = new_figure(5.5 * columns, 3.2 * rows, rows, columns)
    for axes, key in zip(panels.flat, ordered, strict=False):
        _draw_curves(axes, comparison, key, smooth=key in losses)
    for axes in panels.flat[len(ordered) :]:
        axes.axis("off")
    return figure


def _draw_curves(axes: Any, comparison: Comparison, key: str, *, smooth: bool) -> None:
    named = set()
    for i, run in _runs(comparison):
        if key not in run:
            continue
        x, y = np.array(run[key], float).T
        if smooth and len(y) > _SMOOTH:
            y = np.convolve(y, np.full(_SMOOTH, 1 / _SMOOTH), "valid")
            x = x[_SMOOTH - 1 :]
        name = None if i in named else label(comparison.sides[i].name)
        marker = "" if smooth else style(i)["marker"]
        axes.plot(x, y, label=name, **{**style(i), "marker": marker}, lw=1)
        named.add(i)
    title = label(key)
    axes.set(title=f"{title} (mean of {_SMOOTH})" if smooth else title, xlabel="iteration")
    axes.legend()


def _runs(comparison: Comparison) -> Iterator[tuple[int, dict[str, list[tuple[int, float]]]]]:
    for i, side in enumerate(comparison.sides):
        for run in side.curves:
            yield i, run
