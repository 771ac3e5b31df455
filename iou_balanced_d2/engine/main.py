"""One training or evaluation run: its command line, its checks, and what each process does."""

import argparse
import logging
import os
import warnings
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..data import check_datasets, register_datasets_of
from ..projects import import_projects
from .checkpoint import RobustCheckpointer, loading
from .checks import (
    check_best_metric,
    check_launch,
    check_training,
    check_weights,
    warn_linear_rule,
    warn_unused_losses,
)
from .config import choose_device, load_config
from .console import describe_run, setup_loggers
from .launch import Placement
from .optimizer import WeightsAverage
from .rehearsal import check_build
from .run_folder import check_output_dir, check_unused, one_training
from .trainer import Trainer

logger = logging.getLogger(__name__)


def prepare(args: argparse.Namespace, placement: Placement) -> CfgNode:
    """Build, check and freeze the config before the launch; nothing is written on an error.

    Args:
        args: of ``train``, from :func:`~iou_balanced_d2.arguments.parse`.
        placement: from :func:`find_placement`.

    Raises:
        UserError: if something is wrong with the config, the data or the machine.
    """
    cfg = load_config(args.config_file, args.opts)
    choose_device(cfg, args.opts)
    check_launch(cfg, num_gpus=placement.local_size, num_machines=placement.num_machines)
    check_training(cfg)
    register_datasets_of(cfg)
    training, world_size = not args.eval_only, placement.local_size * placement.num_machines
    check_build(cfg, args.config_file, args.opts, training=training, world_size=world_size)
    if placement.machine_rank == 0:  # the others get the weights from there
        check_weights(cfg, resume=args.resume, eval_only=args.eval_only)
    if not (args.eval_only or args.resume or args.overwrite or placement.started):
        check_unused(cfg.OUTPUT_DIR)  # one_training does again: this one comes before data are read
    check_datasets(cfg, training=training, read_images=args.check_dataset)
    if training:
        check_best_metric(cfg)
    check_output_dir(cfg.OUTPUT_DIR)
    cfg.freeze()
    return cfg


def main(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, in this process.

    Args:
        cfg: from :func:`prepare`.
        args: of ``train``, from :func:`~iou_balanced_d2.arguments.parse`.

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
        describe_run(cfg, trainer.model)
        warn_unused_losses(cfg, trainer.model)
        return trainer.train()


def _set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """detectron2's setup, and this package's log in the same places."""
    setup_loggers(cfg.OUTPUT_DIR)
    logging.raiseExceptions = False  # else each line for a full disk prints a traceback
    default_setup(cfg, args)


def write_reports(cfg: CfgNode) -> None:
    """Report on the alignment of scores and boxes, beside the detections of each data set."""
    from ..analysis.alignment import dataset_files, write_alignment_report  # takes a second

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

    Returns the results by data set, those of test-time augmentation (TEST.AUG.ENABLED) under
    "tta", of the average of the weights (MODEL.EMA.ENABLED) under "ema". Exits with code 1 if
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
