"""Checks of a config before a run writes or starts anything."""

import difflib
import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..config import add_iou_balanced_config
from ..data.checks import detector_node
from ..errors import UserError
from ..evaluation import metric_names
from ..modeling import IoUBalancedLoss, interface_of
from .checkpoint import checkpoint_files
from .train_step import PRECISIONS

logger = logging.getLogger(__name__)

# Data workers above this only take memory.
_WORKERS_PER_CPU = 32


def check_best_metric(cfg: CfgNode) -> None:
    """Check that an evaluation gives TEST.BEST_METRIC, once the data sets' classes are known.

    Raises:
        UserError: naming a metric that is near it.
    """
    metric = cfg.TEST.BEST_METRIC
    if not metric:
        return
    if metric.startswith("validation/"):
        if cfg.TEST.LOSS_PERIOD <= 0:
            raise UserError(f"TEST.BEST_METRIC {metric!r} needs a TEST.LOSS_PERIOD above 0")
        return
    several = len(cfg.DATASETS.TEST) > 1
    runs = {"": True, "ema/": cfg.MODEL.EMA.ENABLED, "tta/": cfg.TEST.AUG.ENABLED}
    names = []
    for data_set in cfg.DATASETS.TEST:
        prefixes = [run + f"{data_set}/" * several for run, on in runs.items() if on]
        names += [prefix + name for prefix in prefixes for name in metric_names(data_set)]
    check_name(metric, names)


def check_name(metric: str, names: Sequence[str]) -> None:
    """Check that TEST.BEST_METRIC is one of the names.

    Raises:
        UserError: naming one that is near it.
    """
    if metric not in names:
        close = difflib.get_close_matches(metric, names, n=1, cutoff=0.3) or names[:1]
        raise UserError(
            f"TEST.BEST_METRIC {metric!r} is not a result of the evaluation; "
            f"did you mean {close[0]!r}?"
        )


def check_training(cfg: CfgNode) -> None:
    """Check the values of SOLVER.AMP and MODEL.EMA.

    Raises:
        UserError: naming the key.
    """
    precision, decay = cfg.SOLVER.AMP.PRECISION, cfg.MODEL.EMA.DECAY
    if precision not in PRECISIONS:
        raise UserError(
            f"SOLVER.AMP.PRECISION must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    if cfg.SOLVER.AMP.ENABLED and precision == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise UserError(
            "SOLVER.AMP.PRECISION float16 needs a GPU: on the CPU set SOLVER.AMP.PRECISION bfloat16"
        )
    if not 0 <= decay < 1:
        raise UserError(f"MODEL.EMA.DECAY must be in [0, 1), got {decay}")


def check_weights(cfg: CfgNode, *, resume: bool, eval_only: bool) -> None:
    """Check that MODEL.WEIGHTS exists, that there is something to evaluate, and the detector's own.

    Raises:
        UserError: naming the file, or what to give.
    """
    if resume and checkpoint_files(cfg.OUTPUT_DIR):
        return
    weights = cfg.MODEL.WEIGHTS
    if eval_only and not weights:
        raise UserError(
            "nothing to evaluate: give MODEL.WEIGHTS FILE, or --resume for the last checkpoint "
            f"in OUTPUT_DIR {cfg.OUTPUT_DIR!r}"
        )
    if weights and "://" not in weights and not os.path.isfile(weights.split("?")[0]):
        raise UserError(f"MODEL.WEIGHTS {weights!r} not found")
    if not eval_only:
        interface_of(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)).check_weights(cfg)


def check_launch(cfg: CfgNode, *, num_gpus: int, num_machines: int) -> None:
    """Check the number of processes (num_gpus on each machine) against the GPUs and the batch.

    Raises:
        UserError: naming the flag or key.
    """
    world_size, batch = max(num_gpus, 1) * num_machines, cfg.SOLVER.IMS_PER_BATCH
    if cfg.MODEL.DEVICE.startswith("cuda"):
        devices = torch.cuda.device_count()
        if num_gpus > devices:
            raise UserError(f"--num-gpus {num_gpus}, but this machine has {devices} GPU(s) to use")
        index = cfg.MODEL.DEVICE.partition(":")[2]
        if index.isdecimal() and int(index) >= devices:
            raise UserError(
                f"MODEL.DEVICE {cfg.MODEL.DEVICE!r}, but this machine has {devices} GPU(s) to use"
            )
        if ":" in cfg.MODEL.DEVICE and world_size > 1:
            raise UserError(
                f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is one GPU, but {world_size} processes need "
                "one each: set MODEL.DEVICE cuda"
            )
    workers, most = cfg.DATALOADER.NUM_WORKERS, _WORKERS_PER_CPU * (os.cpu_count() or 1)
    if workers > most:
        raise UserError(f"DATALOADER.NUM_WORKERS {workers} must be at most {most} on this machine")
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and batch % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch} is not a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}, the number of GPUs the schedule was written for: with a batch of your "
            "own set SOLVER.REFERENCE_WORLD_SIZE 0, which switches the scaling off"
        )
    if not reference and batch % world_size:
        raise UserError(f"SOLVER.IMS_PER_BATCH {batch} can't be shared by {world_size} processes")


def warn_linear_rule(cfg: CfgNode) -> None:
    """Warn if batch and learning rate don't follow the linear rule, for training from weights.

    (From scratch, or with normalisation in the head, other rates are right.)
    """
    if cfg.MODEL[detector_node(cfg) or "RETINANET"].get("NORM"):
        return
    batch, rate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR
    rate_per_image = interface_of(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)).lr_per_image
    expected = rate_per_image * batch
    if expected and cfg.MODEL.WEIGHTS and abs(rate / expected - 1) > 0.1:
        logger.warning(
            f"SOLVER.BASE_LR {rate:g} with SOLVER.IMS_PER_BATCH {batch}: the linear rule "
            f"({16 * rate_per_image:g} for 16 images) gives {expected:g} "
            "(less is right for fine-tuning a detector)"
        )


def warn_unused_losses(cfg: CfgNode, model: nn.Module) -> None:
    """Warn of keys of MODEL.IOU_BALANCED that are set for a detector without these losses."""
    if any(isinstance(module, IoUBalancedLoss) for module in model.modules()):
        return
    defaults = get_cfg()
    add_iou_balanced_config(defaults)
    default = defaults.MODEL.IOU_BALANCED
    keys = [k for k, value in cfg.MODEL.IOU_BALANCED.items() if value not in (default[k], 0)]
    if keys:
        names = [name for name, _ in META_ARCH_REGISTRY if name.startswith("IoUBalanced")]
        logger.warning(
            f"MODEL.IOU_BALANCED.{', '.join(keys)} has no effect: {cfg.MODEL.META_ARCHITECTURE} "
            f"has losses of its own. MODEL.META_ARCHITECTURE may be {', '.join(names)}; a file "
            "that is merged later may have set it back"
        )
