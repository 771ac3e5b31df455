#!/usr/bin/env python
"""Carry out a protocol: data sets x variants x seeds, each a run of train_net.py, and compare.

python tools/reproduce.py tools/protocols/cpu.yaml --data ../data --weights R-50.pkl
python tools/reproduce.py --config-file my.yaml --seeds 3    # does it help on my data?

Run it again after an interruption: complete runs are skipped, the others go on.
"""

import argparse
import signal
import sys
from pathlib import Path

from iou_balanced_d2.analysis.comparison import by_dataset
from iou_balanced_d2.analysis.comparison.by_dataset import effect_of, seeds_sentence
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.experiments.evidence import record_file
from iou_balanced_d2.experiments.experiment import Experiment, how_many_at_once
from iou_balanced_d2.experiments.protocol import Protocol, load_protocol, protocol_of_config
from iou_balanced_d2.experiments.results import write_results
from iou_balanced_d2.experiments.runs import Run

Runs = dict[str, dict[str, list[Run]]]  # by data set and variant

TRAIN_SCRIPT = Path(__file__).resolve().parents[1] / "train_net.py"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("protocol", nargs="?", help="YAML file, see "
                      "iou_balanced_d2/experiments/protocol.py")  # fmt: skip
    what.add_argument("--config-file", help="any config: run it with and without the IoU-balanced "
                      "losses, --seeds times each")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="of --config-file; default: 3")
    parser.add_argument("--data", default=".", help='what "{data}" in the protocol stands for')
    parser.add_argument("--weights", default="", help="MODEL.WEIGHTS of all runs")
    parser.add_argument("--output", help="folder of the runs; output/<protocol> if not given")
    parser.add_argument("--records", help="folder for a small record of each complete run, see "
                        "docs/comparing_runs.md; its detections may be deleted then")  # fmt: skip
    parser.add_argument("--at-once", type=int, help="runs at the same time; else what memory holds")
    return parser.parse_args()


def compare_by_detections(protocol: Protocol, runs: Runs, output: Path) -> None:
    for data_set, by_variant in runs.items():
        comparison = write_results(protocol, data_set, by_variant, output / data_set)
        print(f"\n{data_set}, against {comparison.sides[0].name}:")
        print("\n".join(comparison.verdicts()))
        first = comparison.sides[0]
        for side in comparison.sides[1:]:
            difference = comparison.differences[side.name][0]
            effect = effect_of(data_set, difference, min(len(first.runs), len(side.runs)))
            print(f"{side.name}: {seeds_sentence([effect])}")
        print(f"The report is {output / data_set / 'results.md'}")


def compare_by_records(runs: Runs, records: Path, output: Path) -> None:
    names = [run.name for sides in runs.values() for side in sides.values() for run in side]
    found = by_dataset.compare_records([record_file(records, name) for name in names])
    by_dataset.write(found, output)
    for against in found:
        print(f"\n{against.verdict()}")
    print(f"The report is {output / 'by_dataset.md'}")


def main() -> int:
    args = parse_arguments()
    # An exception ends the runs; the signal by itself would leave them behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if args.config_file:
            protocol = protocol_of_config(args.config_file, args.seeds, weights=args.weights)
        else:
            protocol = load_protocol(args.protocol, data=args.data, weights=args.weights)
        output = Path(args.output or f"output/{protocol.name}").resolve()
        at_once = args.at_once or how_many_at_once(protocol.memory_gib)
        records = Path(args.records).resolve() if args.records else None
        runs = Experiment(protocol, output, TRAIN_SCRIPT, at_once, records).carry_out()
        if records and len(runs) > 1:
            compare_by_records(runs, records, output)
        else:
            compare_by_detections(protocol, runs, output)
    except UserError as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
