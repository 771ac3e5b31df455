"""Carry out a protocol: data sets x variants x seeds, each a run of train_net.py, and compare.

python tools/reproduce.py tools/protocols/cpu.yaml --data ../data --weights R-50.pkl
python tools/reproduce.py --config-file my.yaml --seeds 3    # does it help on my data?

Run it again after an interruption: complete runs are skipped, the others go on.
"""

import argparse
import signal
import sys
from pathlib import Path

from ..analysis.comparison import by_dataset
from ..analysis.comparison.by_dataset import effect_of, seeds_sentence
from ..errors import UserError
from ..experiments.evidence import record_file
from ..experiments.experiment import Experiment, how_many_at_once
from ..experiments.protocol import Protocol, load_protocol, protocol_of_config
from ..experiments.results import write_results
from ..experiments.runs import Run

Runs = dict[str, dict[str, list[Run]]]  # by data set and variant


def compare_by_detections(protocol: Protocol, runs: Runs, output: Path) -> None:
    for data_set, by_variant in runs.items():
        comparison = write_results(protocol, data_set, by_variant, output / data_set)
        print(f"\n{data_set}, against {comparison.sides[0].name}:")
        print("\n".join(comparison.verdicts()))
        first = comparison.sides[0]
        for side in comparison.sides[1:]:
            difference = comparison.differences[side.name][0]
            num_runs = min(len(first.runs), len(side.runs))
            effect = effect_of(data_set, difference, num_runs, len(comparison.sides))
            print(f"{side.name}: {seeds_sentence([effect])}")
        print(f"The report is {output / data_set / 'results.md'}")


def compare_by_records(runs: Runs, records: Path, output: Path) -> None:
    names = [run.name for sides in runs.values() for side in sides.values() for run in side]
    found = by_dataset.compare_records([record_file(records, name) for name in names])
    by_dataset.write(found, output)
    for against in found:
        print(f"\n{against.verdict()}")
    print(f"The report is {output / 'by_dataset.md'}")


def run(args: argparse.Namespace) -> None:
    """Carry out what is not done yet, compare, and write the report."""
    # An exception ends the runs; the signal by itself would leave them behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if args.config_file:
        protocol = protocol_of_config(args.config_file, args.seeds, weights=args.weights)
    else:
        protocol = load_protocol(args.protocol, data=args.data, weights=args.weights)
    if len(protocol.variants) < 2:
        raise UserError(f"{args.protocol}: one variant alone: there is nothing to compare it with")
    output = Path(args.output or f"output/{protocol.name}").resolve()
    at_once = args.at_once or how_many_at_once(protocol.memory_gib)
    records = Path(args.records).resolve() if args.records else None
    runs = Experiment(protocol, output, at_once, records).carry_out()
    if records and len(runs) > 1:
        compare_by_records(runs, records, output)
    else:
        compare_by_detections(protocol, runs, output)
