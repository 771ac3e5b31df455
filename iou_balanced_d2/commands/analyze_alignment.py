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
from ..analysis.page import clean
from ..data import register_datasets_of
from ..engine import load_config
from ..errors import UserError

RESULTS = "coco_instances_results.json"


def named(words: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH words as a dict; a word that is a path alone gets its folder's or file's name."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            path = word
            name = Path(word).resolve().stem
        name = clean(name)
        if not name or name in found:
            raise UserError(f"{word!r}: give each a name of its own, as in NAME={path}")
        found[name] = Path(path)
    return found


def sources_of_runs(runs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Arguments of the report for each data set that the runs were evaluated on."""
    sources: dict[str, dict[str, Any]] = {}
    for run_name, folder in runs.items():
        cfg = load_config(str(folder / "config.yaml"))
        register_datasets_of(cfg)
        for data_set in cfg.DATASETS.TEST:
            results = folder / "inference" / data_set / RESULTS
            if not results.is_file():
                raise UserError(f"{results} not found: evaluate with train_net.py --eval-only")
            files = {**dataset_files(data_set), "difficult": cfg.DATASETS.VOC_DIFFICULT}
            source = sources.setdefault(data_set, {**files, "detections": {}})
            source["detections"][run_name] = str(results)
            if source["difficult"] != files["difficult"]:
                raise UserError(
                    f"{folder}: DATASETS.VOC_DIFFICULT is {files['difficult']!r}, but the first "
                    f"run's is {source['difficult']!r}"
                )
    for data_set, source in sources.items():
        missing = runs.keys() - source["detections"].keys()
        if missing:
            raise UserError(f"run {min(missing)!r} was not evaluated on data set {data_set!r}")
    return sources


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
