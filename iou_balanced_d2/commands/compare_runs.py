"""Does run B really beat run A? AP with intervals, p-values and what could have been detected.

A side is one run or several of the same setting, joined by commas or found by a pattern, and may
have a name. The first side is what the others are compared with. See docs/comparing_runs.md.

python tools/compare_runs.py output/baseline output/iou_balanced
python tools/compare_runs.py 'base=output/base_seed*' 'both=output/both_seed*' --output report

Of several data sets, one pooled effect with a forest plot; from records of runs, too:

python tools/compare_runs.py --by-dataset 'base=output/*/base/*' 'both=output/*/both/*'
python tools/compare_runs.py --by-dataset docs/evidence/*.json --output report
"""

import argparse
import glob
import os
import re
from pathlib import Path

from tabulate import tabulate

from ..analysis.comparison import (
    Comparison,
    by_dataset,
    compare_sides,
    write_comparison,
)
from ..analysis.comparison.statistics import format_number
from ..analysis.page import clean
from ..errors import UserError


def parse_side(text: str) -> tuple[str, list[str]]:
    """Name and paths of a side as the command line has it.

    Paths are joined by commas, each may be a pattern with ``*``. Without a name it is that of the
    first run, without a number at its end where there are several.
    """
    name, sign, rest = text.partition("=")
    if not sign or os.path.exists(text):
        name, rest = "", text
    paths: list[str] = []
    for part in [rest] if os.path.exists(rest) else filter(None, rest.split(",")):
        is_pattern = glob.has_magic(part) and not os.path.exists(part)
        found = sorted(glob.glob(part)) if is_pattern else [part]
        if not found:
            raise UserError(f"no run fits {part!r}")
        paths += [os.path.normpath(path) for path in found]
    if not paths:
        raise UserError(f"side {text!r} has no run")
    if not name:
        first = Path(os.path.abspath(paths[0]))  # a link keeps its own name
        name = first.stem if first.is_file() else first.name
        if len(paths) > 1:
            name = re.sub(r"[-_.]?(seed|run)?[-_.]?\d+$", "", name) or name
    return clean(name), paths


def sides_of(texts: list[str]) -> dict[str, list[str]]:
    sides: dict[str, list[str]] = {}
    for name, paths in map(parse_side, texts):
        if name in sides:
            raise UserError(f"two sides are called {name!r}: give names, NAME=RUN")
        sides[name] = paths
    return sides


def ground_truth_of(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (name, sign, file) in zip(texts, pairs, strict=True):
        if not (name and sign and file):
            raise UserError(f"--ground-truth {text}: expected NAME=FILE")
    return {name: file for name, _, file in pairs}


def print_summary(comparison: Comparison) -> None:
    names = ["AP", "AP50", "AP75", "AP90", "APs", "APm", "APl"]
    columns = [comparison.metrics.index(name) for name in names]
    rows = []
    for side in comparison.sides:
        rows.append(
            [side.name, len(side.values), *(format_number(x) for x in side.mean()[columns])]
        )
    for name, found in comparison.differences.items():
        values = [format_number(found[c].value, "+.2f") for c in columns]
        rows.append([f"{name}: difference", "", *values])
    headers = ["", "runs", *names]
    align = ["left", *["right"] * (len(headers) - 1)]
    print(tabulate(rows, headers, "pipe", colalign=align, disable_numparse=True))
    print()
    print("\n".join(comparison.verdicts()))
    if max(len(side.values) for side in comparison.sides) == 1:
        print("One run a side: this is about these two models. Another seed gives another AP.")


def compare_by_dataset(args: argparse.Namespace) -> None:
    if args.ground_truth:
        raise UserError("--ground-truth names one data set: it can't be used with --by-dataset")
    paths = [path for text in args.sides for path in parse_side(text)[1]]
    records = [path for path in paths if path.endswith(".json")]
    for path in paths:
        if records and path not in records:
            raise UserError(f"{path}: runs can't be compared with records ({records[0]})")
        if list(Path(path).glob("*-seed*.json")):
            raise UserError(f"{path} holds records of runs: give {path}/*.json")
    if records:
        if named := [text for text in args.sides if "=" in text and not os.path.exists(text)]:
            raise UserError(f"{named[0]}: a record has its own name, that of its variant")
        found = by_dataset.compare_records(records)
    else:
        found = by_dataset.compare_runs_by_dataset(
            sides_of(args.sides), resamples=args.resamples, seed=args.seed
        )
    for against in found:
        print(f"{against.verdict()}\n\n{against.table()}\n")
    if args.output:
        by_dataset.write(found, args.output)
        print(f"The report is {args.output}/by_dataset.md")


def run(args: argparse.Namespace) -> None:
    """Compare, print the verdicts, and write the report."""
    if args.by_dataset:
        compare_by_dataset(args)
        return
    comparison = compare_sides(
        sides_of(args.sides),
        ground_truth=ground_truth_of(args.ground_truth),
        resamples=args.resamples,
        seed=args.seed,
    )
    print_summary(comparison)
    if args.output:
        write_comparison(comparison, args.output)
        print(f"\nThe report is {args.output}/comparison.html")
