"""The command line of ``train_net.py``: detectron2's own, but nothing is swallowed."""

import argparse
from collections.abc import Sequence

from detectron2.engine import default_argument_parser

from ..errors import UserError


def launch_argument_parser() -> argparse.ArgumentParser:
    """detectron2's flags, with no port that two runs would share, and a time-out."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url=None)
    for action in parser._actions:
        if action.dest == "num_gpus":
            action.help = "number of GPUs *per machine*; on a CPU that of processes"
        elif action.dest == "dist_url":
            action.metavar = "tcp://HOST:PORT"
            action.help = (
                "where processes meet: the address of the machine with --machine-rank 0, and a "
                "free port there (default: on one machine a free port of its own)"
            )
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long processes wait for each other, at the start and in every exchange "
        "(default: 600)",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse detectron2's flags, then KEY VALUE pairs.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        detectron2's namespace; ``opts`` holds the KEY VALUE pairs.

    Raises:
        UserError: for a flag after KEY VALUE options (argparse would take it for a value), a key
            without value, or no --config-file.
    """
    parser = launch_argument_parser()
    parser.add_argument(
        "--check-dataset",
        action="store_true",
        help="read every image of the data sets before anything else (the annotations of data "
        "sets of one's own are checked in any case)",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load checkpoints that hold other Python objects than tensors, arrays and plain "
        "containers: reading them can run code, so only files whose origin you trust",
    )
    args = parser.parse_args(argv)
    for word in args.opts:
        if word.startswith("--"):
            raise UserError(f"{word} must stand before the KEY VALUE options ({args.opts[0]} ...)")
    if len(args.opts) % 2:
        raise UserError(f"KEY VALUE options come in pairs, but {args.opts[-1]!r} is left over")
    if not args.config_file:
        raise UserError("--config-file is required, e.g. one of those in configs/")
    return args
