"""Figures of a comparison: AP over IoU with differences, and the curves of the trainings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.metrics import IOU_PERCENT

if TYPE_CHECKING:
    from .comparison import Comparison

# Okabe and Ito's colours, which the colour-blind can tell apart; sides differ in marker, too.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
_THRESHOLDS = slice(1, 1 + len(IOU_PERCENT))  # of the metrics
_SMOOTH = 20  # points of a loss's curve that are averaged


def style(side: int) -> dict[str, str]:
    """Colour and marker of a side."""
    return {"color": COLORS[side % len(COLORS)], "marker": MARKERS[side % len(MARKERS)]}


def ap_over_iou(comparison: Comparison) -> Figure:
    """AP of each side over IoU thresholds, and beside it the differences with their intervals."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    thresholds = np.array(IOU_PERCENT) / 100
    for i, side in enumerate(comparison.sides):
        left.plot(thresholds, side.mean()[_THRESHOLDS], label=side.name, **style(i))
        for run in side.values if len(side.values) > 1 else ():
            left.plot(thresholds, run[_THRESHOLDS], color=style(i)["color"], alpha=0.3, lw=0.8)
    count = len(comparison.differences)
    for i, (name, found) in enumerate(comparison.differences.items(), start=1):
        part = found[_THRESHOLDS]
        low = [d.value - d.low for d in part]
        high = [d.high - d.value for d in part]
        x = thresholds + 0.008 * (i - (count + 1) / 2)
        y = [d.value for d in part]
        right.errorbar(x, y, yerr=[low, high], label=name, capsize=3, **style(i))
    right.axhline(0, color=COLORS[0], lw=1)
    left.set(title="AP over IoU", xlabel="IoU threshold", ylabel="AP (%)")
    first = comparison.sides[0].name
    right.set(
        title=f"Difference from {first}, 95 % interval", xlabel="IoU threshold", ylabel="AP points"
    )
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def curves(comparison: Comparison) -> Figure | None:
    """Losses and AP during the trainings; None where no run has kept its metrics."""
    names = {key: None for _, run in _runs(comparison) for key in run}
    if not names:
        return None
    losses = [key for key in names if not key.endswith("AP")]
    ordered = [*losses, *(key for key in names if key not in losses)]
    columns = min(len(ordered), 2)
    rows = -(-len(ordered) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, key in zip(panels, ordered, strict=False):
        _draw_curves(axes, comparison, key, smooth=key in losses)
    for axes in panels[len(ordered) :]:
        axes.axis("off")
    return figure


def _draw_curves(axes: Any, comparison: Comparison, key: str, *, smooth: bool) -> None:
    told = set()
    for i, run in _runs(comparison):
        if key not in run:
            continue
        x, y = np.array(run[key], float).T
        if smooth and len(y) > _SMOOTH:
            y = np.convolve(y, np.full(_SMOOTH, 1 / _SMOOTH), "valid")
            x = x[_SMOOTH - 1 :]
        label = None if i in told else comparison.sides[i].name
        marker = "" if smooth else style(i)["marker"]
        axes.plot(x, y, label=label, color=style(i)["color"], marker=marker, lw=1)
        told.add(i)
    axes.set(title=f"{key} (mean of {_SMOOTH})" if smooth else key, xlabel="iteration")
    axes.legend()
    axes.grid(alpha=0.3)


def _runs(comparison: Comparison) -> Iterator[tuple[int, dict[str, list[tuple[int, float]]]]]:
    for i, side in enumerate(comparison.sides):
        for run in side.curves:
            yield i, run


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; returns the two files."""
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(files[0], dpi=110)
    figure.savefig(files[1])
    return files
