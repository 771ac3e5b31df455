"""Figure of a comparison: AP over IoU, and the differences."""

from matplotlib.figure import Figure

from ...evaluation.metrics import IOU_PERCENT, IOU_THRESHOLDS
from ..plots import label, new_figure, style
from .compare import Comparison

_THRESHOLDS = slice(1, 1 + len(IOU_PERCENT))  # of the metrics


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
