"""Forest plot: the effect on each data set with its interval, and the pooled effects below."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..plots import label
from .meta_analysis import Effect, Estimate, Pooled

_SMALL = 7.5  # points; 10 inches are drawn about 900 pixels wide in a README


def forest_plot(
    title: str, effects: Mapping[str, Sequence[Effect]], pooled: Mapping[str, Pooled], color: str
) -> Figure:
    """Draw metrics side by side, data sets below one another; ``pooled`` may lack metrics."""
    names = [label(e.name) for e in next(iter(effects.values()))]
    rows = [*names, "mean, sets like these", "mean, these alone"]
    size = (10, 0.9 + 0.42 * len(rows))
    figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(effects), sharey=True, squeeze=False)[0]
    for axes, (metric, found) in zip(panels, effects.items(), strict=True):
        _draw(axes, found, pooled.get(metric), color)
        axes.set_title(label(metric), fontsize=9)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8.5)
    panels[0].set_ylim(len(rows) - 0.4, -0.75)
    figure.suptitle(f"{label(title)}: difference in AP points, 95 % intervals", fontsize=10)
    return figure


def _draw(axes: Any, effects: Sequence[Effect], pooled: Pooled | None, color: str) -> None:
    axes.axvline(0, color="#888888", lw=0.8)
    ends = []
    for row, effect in enumerate(effects):
        if not effect.standard_error > 0:
            axes.text(0, row, "–", ha="center", va="center", fontsize=_SMALL)
            continue
        low, high = effect.interval()
        ends += [low, high]
        axes.plot([low, high], [row, row], color=color, lw=1.2)
        axes.plot(effect.value, row, "s", color=color, markersize=5)
        _number(axes, row, effect.value, low, high)
    for row, estimate in enumerate([pooled.random, pooled.these] if pooled else [], len(effects)):
        _diamond(axes, row, estimate, color)
        ends += [estimate.low, estimate.high]
    axes.axhline(len(effects) - 0.55, color="#888888", lw=0.5)
    _limit(axes, [e.value for e in effects if e.standard_error > 0], ends)
    axes.tick_params(axis="x", labelsize=_SMALL)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _diamond(axes: Any, row: int, estimate: Estimate, color: str) -> None:
    x = [estimate.low, estimate.value, estimate.high, estimate.value]
    axes.fill(x, [row, row - 0.17, row, row + 0.17], color=color)
    _number(axes, row, estimate.value, estimate.low, estimate.high)


def _number(axes: Any, row: int, value: float, low: float, high: float) -> None:
    text = f"{value:+.1f} [{low:.1f}, {high:.1f}]"
    # Centred in the panel: beside a square it would be cut off where the interval is wide.
    axes.text(
        0.5, row - 0.36, text, ha="center", va="center", fontsize=_SMALL,
        transform=axes.get_yaxis_transform(),
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip


def _limit(axes: Any, values: Sequence[float], ends: Sequence[float]) -> None:
    """Show all values and the usual interval; a far longer one may leave the panel."""
    if not ends:
        return
    reach = max(3 * max(map(abs, values)), 3 * sorted(map(abs, ends))[len(ends) // 2])
    low, high = max(min(ends), -reach), min(max(ends), reach)
    low, high = min(low, 0), max(high, 0)
    axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
