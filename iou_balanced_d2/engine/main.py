"""One training or evaluation run: its command line, its checks, and what each process does."""

import argparse
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..analysis.alignment import dataset_files, write_alignment_report
from ..data import check_datasets, register_datasets_of
from ..errors import UserError
from ..projects import import_projects
from .checkpoint import RobustCheckpointer, loading
from .checks import (
    check_launch,
    check_model,
    check_training,
    check_weights,
    warn_linear_rule,
)
from .config import choose_device, load_config
from .launch import Placement
from .optimizer import WeightsAverage
from .run_folder import check_output_dir, check_unused, one_training
from .trainer import Trainer

logger = logging.getLogger(__name__)


def launch_argument_parser() -> argparse.ArgumentParser:
    """detectron2's flags, without a port that two runs would share, and --dist-timeout."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")
    actions = {action.dest: action for action in parser._actions}
    actions["num_gpus"].help = "number of GPUs *per machine*; on a CPU number of processes"
    actions["dist_url"].help = "tcp://HOST:PORT: the machine with --machine-rank 0, a free port"
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long processes wait for each other, at the start and later (default: 600)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the training that OUTPUT_DIR holds and start anew (not with --resume)",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse detectron2's flags and KEY VALUE pairs, those of the process by default.

    Raises:
        UserError: for a flag after KEY VALUE options (argparse would take it for a value), a key
            without value, or no --config-file.
    """
    parser = launch_argument_parser()
    parser.add_argument(
        "--check-dataset",
        action="store_true",
        help="read every image of the data sets first (annotations of one's own data sets are "
        "always checked)",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load checkpoints that hold other Python objects than tensors, arrays and plain "
        "containers: this can run code, so only files whose origin you trust",
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


def prepare(args: argparse.Namespace, placement: Placement) -> CfgNode:
    """Build, check and freeze the config before the launch; nothing is written on an error.

    Args:
        args: from :func:`parse_arguments`.
        placement: from :func:`find_placement`.

    Raises:
        UserError: if something is wrong with the config, the data or the machine.
    """
    cfg = load_config(args.config_file, args.opts)
    choose_device(cfg, args.opts)
    check_model(cfg)
    check_launch(cfg, num_gpus=placement.local_size, num_machines=placement.num_machines)
    check_training(cfg)
    if placement.machine_rank == 0:  # the others get the weights from there
        check_weights(cfg, resume=args.resume, eval_only=args.eval_only)
    if not (args.eval_only or args.resume or args.overwrite or placement.started):
        check_unused(cfg.OUTPUT_DIR)  # one_training does again: this one comes before data are read
    check_datasets(cfg, training=not args.eval_only, read_images=args.check_dataset)
    check_output_dir(cfg.OUTPUT_DIR)
    cfg.freeze()
    return cfg


def main(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, in this process.

    Args:
        cfg: from :func:`prepare`.
        args: from :func:`parse_arguments`.

    Returns:
        the evaluation's results, where there are any.
    """
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # of detectron2's anchor generator
    import_projects()  # as in the launching process
    register_datasets_of(cfg)
    if args.eval_only:
        _set_up(cfg, args)
        return evaluate(cfg, resume=args.resume, trust_checkpoint=args.trust_checkpoint)
    with one_training(cfg.OUTPUT_DIR, args, cfg.MODEL.WEIGHTS) as resume:
        _set_up(cfg, args)
        warn_linear_rule(cfg)
        trainer = Trainer(cfg, trust_checkpoint=args.trust_checkpoint)
        trainer.resume_or_load(resume=resume)
        return trainer.train()


def _set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """detectron2's setup, and this package's log in the same places."""
    rank = comm.get_rank()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="iou_balanced_d2")
    # With these very arguments, so that detectron2's default_setup finds its loggers set up.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    logging.raiseExceptions = False  # else each line for a full disk prints a traceback
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":
        logger.info("Running on the CPU (MODEL.DEVICE: cpu)")


def write_reports(cfg: CfgNode) -> None:
    """Report on the alignment of scores and boxes, beside the detections of each data set."""
    for name in cfg.DATASETS.TEST:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", name)
        report = os.path.join(folder, "alignment")
        write_alignment_report(
            detections={"model": os.path.join(folder, "coco_instances_results.json")},
            output_dir=report,
            difficult=cfg.DATASETS.VOC_DIFFICULT,
            **dataset_files(name),
        )
        logger.info(f"Alignment of scores and boxes: {os.path.join(report, 'index.html')}")


def evaluate(cfg: CfgNode, *, resume: bool, trust_checkpoint: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or the last checkpoint in OUTPUT_DIR when resuming.

    TEST.AUG.ENABLED adds test-time augmentation, MODEL.EMA.ENABLED the average of the weights.

    Returns:
        the results by data set, others under "tta" and "ema"; exits with code 1 if
        TEST.EXPECTED_RESULTS are missed.
    """
    model = Trainer.build_model(cfg)
    checkpointer = RobustCheckpointer(model, cfg.OUTPUT_DIR, trust=trust_checkpoint, strict=True)
    others = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results = {**results, **Trainer.test_with_tta(cfg, model)}
    if cfg.MODEL.EMA.ENABLED and "ema" in others:
        average = WeightsAverage(model, cfg.MODEL.EMA.DECAY)
        with loading(cfg.MODEL.WEIGHTS, "ema"):
            average.load_state_dict(others["ema"])
        results = {**results, **Trainer.test_average(cfg, model, average.state_dict())}
    if comm.is_main_process():
        if cfg.TEST.ALIGNMENT_REPORT:
            write_reports(cfg)
        verify_results(cfg, results)
    return results
