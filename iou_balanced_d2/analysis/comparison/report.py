"""A comparison as Markdown, HTML and JSON."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...errors import UserError
from ...evaluation.metrics import IOU_PERCENT, IOU_THRESHOLDS
from ...files import make_folder, write_text
from ..page import Page, plain
from ..plots import label, new_figure, save_figure, style
from .compare import Comparison, SideResult
from .statistics import Difference, format_number, format_p

_DIFFERENCE_HEADERS = ("metric", "difference", "95 % interval", "p", "std. error", "detectable")
_THRESHOLDS = slice(1, 1 + len(IOU_PERCENT))  # of the metrics


def write_comparison(comparison: Comparison, folder: str | Path) -> None:
    """Write comparison.md, .html and .json, and the figures as PNG and SVG.

    Args:
        comparison: what to write.
        folder: made if absent.

    Raises:
        UserError: if they can't be written.
    """
    folder = make_folder(folder)
    try:
        page = _page(comparison, folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}") from error
    write_text(folder / "comparison.md", page.markdown())
    write_text(folder / "comparison.html", page.html())
    content = json.dumps(to_json(comparison), indent=1, allow_nan=False)
    write_text(folder / "comparison.json", content + "\n")


def _page(comparison: Comparison, folder: Path) -> Page:
    """The report; draws its figures into the folder."""
    page = Page("Comparison of runs")
    first, metrics = comparison.sides[0].name, comparison.metrics
    overall = range(sum(not name.startswith("AP-") for name in metrics))
    classes = range(len(overall), len(metrics))
    page.heading("Verdict")
    for text in (*comparison.verdicts(), *_notes(comparison)):
        page.text(text)
    page.heading("AP")
    _add_values(page, comparison, overall)
    figure = save_figure(ap_over_iou(comparison), folder / "ap_over_iou.png")
    page.figure(figure, "AP over IoU thresholds, and the differences with their intervals")
    for name, found in comparison.differences.items():
        page.heading(f"{name} against {first}")
        page.text("AP is the metric that the verdict is of; the others say where it comes from.")
        _add_differences(page, metrics, found, overall)
    page.heading("AP of each class")
    _add_values(page, comparison, classes)
    for name, found in comparison.differences.items():
        page.heading(f"Each class: {name} against {first}")
        page.text("Descriptive: of many classes, one in twenty differs at p .05 by chance alone.")
        _add_differences(page, metrics, found, classes)
    page.heading("Trainings")
    runs = [
        [side.name, path, format_number(values[0])]
        for side in comparison.sides
        for path, values in zip(side.runs, side.values, strict=True)
    ]
    page.table(("side", "run", "AP"), runs)
    for link in _alignment_reports(comparison, folder):
        page.link(*link)
    return page


def _notes(comparison: Comparison) -> list[str]:
    images = ", ".join(f"{name} ({n} images)" for name, n in comparison.datasets.items())
    notes = [
        f"On {images}. Numbers are in percent, differences in percent points. Intervals and p are "
        f"of a paired bootstrap: images are drawn with replacement {comparison.resamples} times, "
        f"the same ones for all runs (seed {comparison.seed})."
    ]
    runs = [len(side.values) for side in comparison.sides]
    if max(runs) == 1:
        notes.append(
            "One run a side: this compares these trained models on new images. Another run of the "
            "same setting gives another AP, and that is not in these intervals: whether the "
            "settings differ takes two or more runs of each."
        )
    else:
        notes.append(
            "The spread of the runs of a side is part of the intervals, pooled over all sides "
            f"({sum(n - 1 for n in runs)} degrees of freedom), by Student's t."
        )
    if len(comparison.sides) > 2:
        notes.append(
            "Each p is of one comparison alone: among several sides, the best of them is found "
            "better by chance more often than it says."
        )
    return notes


def _add_values(page: Page, comparison: Comparison, metrics: range) -> None:
    """Mean and standard deviation of each side, one row a metric."""
    headers = ["metric"]
    for side in comparison.sides:
        runs = len(side.values)
        headers.append(side.name if runs == 1 else f"{side.name} (mean ± std of {runs})")
    rows = [
        [comparison.metrics[m], *(_value(side, m) for side in comparison.sides)] for m in metrics
    ]
    page.table(headers, rows)


def _value(side: SideResult, metric: int) -> str:
    mean, deviation = side.mean()[metric], side.deviation()[metric]
    return format_number(mean) + ("" if math.isnan(deviation) else f" ± {deviation:.2f}")


def _add_differences(
    page: Page, names: Sequence[str], found: Sequence[Difference], metrics: range
) -> None:
    rows = []
    for m in metrics:
        d = found[m]
        interval = "–" if math.isnan(d.low) else f"[{d.low:.2f}, {d.high:.2f}]"
        value = format_number(d.value, "+.2f")
        name = names[m] + (" (primary)" if m == 0 else "")
        numbers = [format_number(d.standard_error), format_number(d.detectable)]
        rows.append([name, value, interval, format_p(d.p), *numbers])
    page.table(_DIFFERENCE_HEADERS, rows)


def _alignment_reports(comparison: Comparison, folder: Path) -> list[tuple[str, str]]:
    """The pages that ``train_net.py --eval-only`` wrote with TEST.ALIGNMENT_REPORT."""
    pages = [
        Path(path, "inference", name, "alignment/index.html")
        for side in comparison.sides
        for path in side.runs
        for name in comparison.datasets
    ]
    return [
        (
            f"Alignment of scores and boxes: {page}",
            os.path.relpath(page.resolve(), folder.resolve()),
        )
        for page in pages
        if page.is_file()
    ]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, as JSON values; null where undefined."""

    def named(values: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(comparison.metrics, values, strict=True))

    sides = [
        {
            "name": side.name,
            "runs": [
                {"path": path, "metrics": named(values)}
                for path, values in zip(side.runs, side.values, strict=True)
            ],
            "mean": named(side.mean()),
            "std": named(side.deviation()),
        }
        for side in comparison.sides
    ]
    content: dict[str, Any] = plain(
        {
            "datasets": comparison.datasets,
            "resamples": comparison.resamples,
            "seed": comparison.seed,
            "primary_metric": comparison.metrics[0],
            "verdicts": comparison.verdicts(),
            "sides": sides,
            "differences": {name: named(found) for name, found in comparison.differences.items()},
        }
    )
    return content


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
