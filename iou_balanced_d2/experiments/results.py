"""What came out of an experiment: the comparison, what the runs measured, and how to repeat it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ..analysis.alignment import analyze
from ..analysis.comparison import Comparison, compare_sides, write_comparison
from ..analysis.comparison.report import to_json
from ..analysis.comparison.runs import load_run
from ..evaluation.detections import read_detections, read_ground_truth
from ..files import write_text
from .protocol import Protocol
from .runs import Run

# Scalars of a run's log, each summed up in one number.
_SCALARS: dict[str, Callable[[list[float]], Any]] = {
    "iou_balanced/w_loc": lambda values: values[-1],
    "iou_balanced/loc_mean_weight": np.mean,
    "iou_balanced/mean_pos_iou": lambda values: values[-1],
    "time": np.median,
}
# The table's columns: header -> what was measured, and its format.
_COLUMNS = {
    "w_loc": ("iou_balanced/w_loc", ".2f"),
    "mean weight of the box loss": ("iou_balanced/loc_mean_weight", ".2f"),
    "IoU of positives at the end": ("iou_balanced/mean_pos_iou", ".2f"),
    "score-IoU correlation (Pearson)": ("score_iou_correlation", ".2f"),
    "s/iteration": ("time", ".3f"),
    "peak memory of the process (MiB)": ("peak_memory_mib", ".0f"),
}


def write_results(
    protocol: Protocol, data_set: str, runs: Mapping[str, Sequence[Run]], folder: Path
) -> Comparison:
    """Compare the variants on one data set, and write the report.

    Writes what :func:`write_comparison` writes, ``results.md`` (protocol, comparison, what the runs
    measured) and ``results.json`` (all numbers, and each run's command, seed, versions, hardware
    and time).

    Args:
        protocol: what was run.
        data_set: its name in the protocol.
        runs: complete runs of each variant, at least two variants.
        folder: of the files.

    Returns:
        the comparison with the first variant.

    Raises:
        UserError: if the runs' files are missing or broken.
    """
    comparison = compare_sides({name: [r.folder for r in group] for name, group in runs.items()})
    write_comparison(comparison, folder)
    compared = (folder / "comparison.md").read_text(encoding="utf-8")
    compared = "#" + compared.replace("\n#", "\n##").strip()  # below this report's own title
    measured = {name: [measures(run) for run in group] for name, group in runs.items()}
    text = (
        f"# {protocol.name}: {data_set}\n\n## Protocol\n\n{protocol.description}\n\n"
        f"Seeds: {', '.join(map(str, protocol.seeds))}.\n\n{compared}\n\n"
        f"## What the runs measured (means over seeds)\n\n{_table(measured)}\n"
    )
    write_text(folder / "results.md", text)
    content = {
        "protocol": protocol.name,
        "description": protocol.description,
        "data_set": data_set,
        "comparison": to_json(comparison),
        "runs": {
            name: [
                run.record | {"measured": m} for run, m in zip(group, measured[name], strict=True)
            ]
            for name, group in runs.items()
        },
    }
    write_text(folder / "results.json", json.dumps(content, indent=1))
    return comparison


def measures(run: Run) -> dict[str, float | None]:
    """What one run measured beside its AP; None for what it did not log.

    Returns:
        by scalar name; "score_iou_correlation", Pearson's, of the detections that match an object
        at IoU .5, the mean over test sets; "peak_memory_mib".
    """
    found: dict[str, float | None] = {}
    for name, summary in _SCALARS.items():
        values = run.scalars(name)
        found[name] = float(summary(values)) if values else None
    found["score_iou_correlation"] = _correlation(run)
    found["peak_memory_mib"] = run.record.get("peak_memory_mib")
    return found


def _correlation(run: Run) -> float | None:
    loaded = load_run(run.folder)
    values = []
    for name, annotations in loaded.ground_truth.items():
        ground_truth = read_ground_truth(annotations.path, annotations.difficult)
        detections = read_detections(loaded.detections[name], ground_truth, probabilities=True)
        values.append(analyze(ground_truth, detections).results["correlation"]["pearson"])
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else None


def _table(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = []
    for variant, runs in measured.items():
        cells = [variant]
        for name, form in _COLUMNS.values():
            values = [run[name] for run in runs if run[name] is not None]
            cells.append(format(np.mean(values), form) if values else "-")
        rows.append(cells)
    return tabulate(rows, ["variant", *_COLUMNS], tablefmt="pipe", disable_numparse=True)
