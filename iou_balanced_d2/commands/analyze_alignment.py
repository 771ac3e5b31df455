"""Does a detector's score know how good its boxes are? Writes a page of figures that show it.

python tools/analyze_alignment.py --run output
python tools/analyze_alignment.py --ground-truth GT.json --detections plain=A.json balanced=B.json
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..analysis.alignment import dataset_files, write_alignment_report
from ..analysis.comparison.compare import check_same_ground_truth
from ..analysis.comparison.runs import load_run
from ..errors import UserError
from .compare_runs import sides_of


def named(words: Sequence[str]) -> dict[str, Path]:
    """[NAME=]PATH words as a dict; see :func:`sides_of`."""
    sides = sides_of(list(words))
    for name, paths in sides.items():
        if len(paths) > 1:
            raise UserError(f"{name!r} has {len(paths)} paths: give each by itself, NAME=PATH")
    return {name: Path(path) for name, (path,) in sides.items()}


def sources_of_runs(runs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Arguments of the report for each data set that the runs were evaluated on."""
    loaded = {name: load_run(folder) for name, folder in runs.items()}
    check_same_ground_truth(list(loaded.values()))
    return {
        data_set: {
            **dataset_files(data_set),
            "difficult": truth.difficult,
            "detections": {name: run.detections[data_set] for name, run in loaded.items()},
        }
        for data_set, truth in next(iter(loaded.values())).ground_truth.items()
    }


def print_summary(results: Mapping[str, Any]) -> None:
    rows = [
        [
            name,
            r["ap"]["AP"],
            r["ceilings"]["perfect_ranking"]["AP"],
            r["ceilings"]["perfect_placing"]["AP"],
            r["correlation"]["spearman"],
        ]
        for name, r in results.items()
    ]
    headers = ["", "AP", "perfect ranking", "perfect placing", "Spearman of score and IoU"]
    formats = ("", ".1f", ".1f", ".1f", ".3f")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=formats, missingval="-"))


def run(args: argparse.Namespace) -> None:
    """Write the report of each data set and print its summary."""
    if args.run:
        runs = named(args.run)
        sources = sources_of_runs(runs)
        output = Path(args.output or next(iter(runs.values())) / "alignment")
    else:
        files = {name: str(path) for name, path in named(args.detections).items()}
        sources = {"": {"ground_truth": args.ground_truth, "image_root": args.images}}
        sources[""]["detections"] = files
        output = Path(args.output or "alignment")
    for data_set, source in sources.items():
        folder = output / data_set
        results = write_alignment_report(output_dir=str(folder), **source)
        print_summary(results)
        for name, result in results.items():
            print(f"{name}: {result['verdict']}")
        print(f"Report: {folder / 'index.html'}")
