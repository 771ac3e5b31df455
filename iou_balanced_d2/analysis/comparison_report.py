"""A comparison as Markdown, HTML and JSON."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tabulate import tabulate

from ..errors import UserError
from . import comparison_figures as figures
from .page import Page
from .statistics import Difference, format_p

if TYPE_CHECKING:
    from .comparison import Comparison, SideResult

_TITLE = "Comparison of runs"
_DIFFERENCE_HEADERS = ("metric", "difference", "95 % interval", "p", "std. error", "detectable")
_FIGURES = {
    "ap_over_iou": "AP over IoU thresholds, and the differences with their intervals",
    "curves": "Losses and AP during the trainings",
}


class Table(NamedTuple):
    """Headers and rows, all of them text."""

    headers: Sequence[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """A part of the report.

    Attributes:
        title: its heading.
        texts: paragraphs.
        table: below them.
        figure: name of the figure below that, "" for none.
        links: text and address of each.
    """

    title: str
    texts: list[str]
    table: Table | None = None
    figure: str = ""
    links: Sequence[tuple[str, str]] = ()


def sections(comparison: Comparison) -> Iterator[Section]:
    """The report, whatever it is written in."""
    yield Section("Verdict", [*comparison.verdicts(), *_notes(comparison)])
    num_classes = sum(name.startswith("AP-") for name in comparison.metrics)
    overall = len(comparison.metrics) - num_classes
    yield Section("AP", [], _values(comparison, range(overall)), "ap_over_iou")
    for name, found in comparison.differences.items():
        title = f"{name} against {comparison.sides[0].name}"
        text = "AP is the metric that the verdict is of; the others describe where it comes from."
        yield Section(title, [text], _differences(comparison, found, range(overall)))
    classes = range(overall, len(comparison.metrics))
    yield Section("AP of each class", [], _values(comparison, classes))
    for name, found in comparison.differences.items():
        title = f"Each class: {name} against {comparison.sides[0].name}"
        text = "Descriptive: of many classes, one in twenty differs at p .05 by chance alone."
        yield Section(title, [text], _differences(comparison, found, classes))
    yield Section("Trainings", [], _runs(comparison), "curves", _alignment_reports(comparison))


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


def _values(comparison: Comparison, metrics: range) -> Table:
    """Mean and standard deviation of each side, one row a metric."""
    headers = ["metric"]
    for side in comparison.sides:
        runs = len(side.values)
        headers.append(side.name if runs == 1 else f"{side.name} (mean ± std of {runs})")
    rows = [
        [comparison.metrics[m], *(_value(side, m) for side in comparison.sides)] for m in metrics
    ]
    return Table(headers, rows)


def _value(side: SideResult, metric: int) -> str:
    mean, deviation = side.mean()[metric], side.deviation()[metric]
    return _number(mean) + ("" if math.isnan(deviation) else f" ± {deviation:.2f}")


def _differences(comparison: Comparison, found: Sequence[Difference], metrics: range) -> Table:
    rows = []
    for m in metrics:
        d = found[m]
        interval = "–" if math.isnan(d.low) else f"[{d.low:.2f}, {d.high:.2f}]"
        value = "–" if math.isnan(d.value) else f"{d.value:+.2f}"
        name = comparison.metrics[m] + (" (primary)" if m == 0 else "")
        numbers = [_number(d.standard_error), _number(d.detectable)]
        rows.append([name, value, interval, format_p(d.p), *numbers])
    return Table(_DIFFERENCE_HEADERS, rows)


def _runs(comparison: Comparison) -> Table:
    rows = [
        [side.name, path, _number(values[0])]
        for side in comparison.sides
        for path, values in zip(side.runs, side.values, strict=True)
    ]
    return Table(("side", "run", "AP"), rows)


def _alignment_reports(comparison: Comparison) -> list[tuple[str, str]]:
    """The pages that ``train_net.py --eval-only`` wrote with TEST.ALIGNMENT_REPORT."""
    pages = [
        Path(path, "inference", name, "alignment/index.html")
        for side in comparison.sides
        for path in side.runs
        for name in comparison.datasets
    ]
    return [
        (f"Alignment of scores and boxes: {page}", page.resolve().as_uri())
        for page in pages
        if page.is_file()
    ]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def markdown(comparison: Comparison) -> str:
    """The report as Markdown; its figures are files beside it, if :func:`write` writes it."""
    parts = [f"# {_TITLE}"]
    shown = _figures(comparison)
    for section in sections(comparison):
        parts += [f"## {section.title}", *section.texts]
        if section.table:
            headers, rows = section.table
            escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
            align = ["left", *["right"] * (len(headers) - 1)]
            parts.append(tabulate(escaped, headers, "pipe", colalign=align, disable_numparse=True))
        if section.figure in shown:
            parts.append(f"![{_FIGURES[section.figure]}]({section.figure}.png)")
        parts += [f"[{text}]({target})" for text, target in section.links]
    return "\n\n".join(parts) + "\n"


def html(comparison: Comparison) -> str:
    """The report as one page that holds its figures."""
    with tempfile.TemporaryDirectory() as folder:
        shown = _figures(comparison)
        for name, figure in shown.items():
            figures.save(figure, Path(folder), name)
        page = Page(_TITLE)
        for section in sections(comparison):
            page.heading(section.title)
            for text in section.texts:
                page.text(text)
            if section.table:
                page.table(*section.table)
            if section.figure in shown:
                page.figure(Path(folder, f"{section.figure}.png"), _FIGURES[section.figure])
            for link in section.links:
                page.link(*link)
        return page.html()


def _figures(comparison: Comparison) -> dict[str, Any]:
    found = {"ap_over_iou": figures.ap_over_iou(comparison), "curves": figures.curves(comparison)}
    return {name: figure for name, figure in found.items() if figure is not None}


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, as JSON values; null where undefined."""
    names = comparison.metrics
    return {
        "datasets": comparison.datasets,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "primary_metric": names[0],
        "verdicts": comparison.verdicts(),
        "sides": [
            {
                "name": side.name,
                "runs": [
                    {"path": path, "metrics": _named(names, values)}
                    for path, values in zip(side.runs, side.values, strict=True)
                ],
                "mean": _named(names, side.mean()),
                "std": _named(names, side.deviation()),
            }
            for side in comparison.sides
        ],
        "differences": {
            side: {
                name: _named(Difference._fields, d) for name, d in zip(names, found, strict=True)
            }
            for side, found in comparison.differences.items()
        },
    }


def _named(names: Sequence[str], values: Sequence[float] | Any) -> dict[str, float | None]:
    return {n: None if math.isnan(v) else float(v) for n, v in zip(names, values, strict=True)}


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.md, .html and .json, and the figures as PNG and SVG.

    Args:
        comparison: what to write.
        folder: made if absent.

    Returns:
        the files.

    Raises:
        UserError: if they can't be written.
    """
    contents = {
        "comparison.md": markdown(comparison),
        "comparison.html": html(comparison),
        "comparison.json": json.dumps(to_json(comparison), indent=1, allow_nan=False) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / name for name in contents]
        for file, content in zip(files, contents.values(), strict=True):
            file.write_text(content, encoding="utf-8")
        for name, figure in _figures(comparison).items():
            files += figures.save(figure, folder, name)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}") from error
    return files
