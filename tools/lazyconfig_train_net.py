#!/usr/bin/env python
"""Train or evaluate a detector from a LazyConfig, detectron2's configs in Python.

python tools/lazyconfig_train_net.py \
    --config-file configs/lazy/COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.py

Overrides are KEY=VALUE: train.max_iter=1000 model.iou_balanced.cls_eta=1.5. A config file runs
code: take only those you trust.
"""

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys
import warnings
from typing import Any

from iou_balanced_d2.arguments import launch_argument_parser
from iou_balanced_d2.config.description import config_help
from iou_balanced_d2.engine import find_placement, launch
from iou_balanced_d2.engine.checkpoint import LossState, RobustCheckpointer
from iou_balanced_d2.engine.config import flatten
from iou_balanced_d2.engine.console import setup_loggers
from iou_balanced_d2.engine.run_folder import check_output_dir, one_training
from iou_balanced_d2.engine.train_step import StepTrainer
from iou_balanced_d2.errors import UserError, one_line
from iou_balanced_d2.evaluation import BoxEvaluator
from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.model_zoo import get_detectron2_config
from iou_balanced_d2.projects import import_projects

# isort: split
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

PARTS = ("model", "optimizer", "lr_multiplier", "dataloader", "train")


def load(args: argparse.Namespace) -> DictConfig:
    """The config of the run, checked as far as that goes without building it."""
    path = args.config_file
    if not os.path.isfile(path):
        raise UserError(f"--config-file {path!r} not found")
    if not path.endswith(".py"):
        raise UserError(f"--config-file {path!r} does not end in .py: YAML is for train_net.py")
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:
        raise UserError(f"config file {path!r}: {type(error).__name__}: {error}") from error
    missing = [part for part in PARTS if part not in cfg]
    if missing:
        raise UserError(f"config file {path!r} does not define {', '.join(missing)}")
    keys = [*flat_keys(OmegaConf.to_container(cfg)), *model_arguments(cfg)]
    for word in args.opts:
        check_override(word, keys)
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except Exception as error:  # of hydra or omegaconf
        raise UserError(f"{' '.join(args.opts)}: {str(error).splitlines()[0]}") from error
    for part in (*PARTS, "train.amp"):
        if not isinstance(node := OmegaConf.select(cfg, part), DictConfig):
            raise UserError(f"{part} must have keys of its own, got {node!r}")
    for key in ("device", "init_checkpoint", "output_dir"):
        if not isinstance(cfg.train[key], str):
            raise UserError(f"train.{key} must be a text, got {cfg.train[key]!r}")
    try:
        instantiate(cfg.model.get("iou_balanced"))
    except ValueError as error:
        raise UserError(f"model.iou_balanced: {error}") from error
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        cfg.train.device = "cpu"
    if cfg.train.amp.enabled and not (args.eval_only or cfg.train.device.startswith("cuda")):
        raise UserError("train.amp.enabled needs a GPU: float16 on a CPU has no gradient scaling")
    weights = cfg.train.init_checkpoint
    if weights and "://" not in weights and not os.path.isfile(weights.split("?")[0]):
        raise UserError(f"train.init_checkpoint {weights!r} not found")
    if args.eval_only and not weights and not args.resume:
        raise UserError("nothing to evaluate: give train.init_checkpoint=FILE, or --resume")
    return cfg


def key_help() -> str:
    """The keys that the script reads besides detectron2's of the model and the data."""
    losses = [item for item in config_help() if item.key.startswith("MODEL.IOU_BALANCED.")]
    train = flatten(OmegaConf.to_container(get_detectron2_config("common/train.py").train))
    shown = [f"  {item.key.lower()}={item.default}" for item in losses]
    shown += [f"  train.{key}={value}" for key, value in train.items()]
    return "\n".join(
        [
            "keys, with their defaults (python -m iou_balanced_d2.config explains the losses'):",
            *shown,
            "and the arguments of the other parts that the config file defines",
        ]
    )


def flat_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    below = [[f"{prefix}{key}", *flat_keys(v, f"{prefix}{key}.")] for key, v in node.items()]
    return [key for keys in below for key in keys]


def model_arguments(cfg: DictConfig) -> list[str]:
    """The detector's arguments as keys; those with a default may be left out in the file."""
    target = cfg.model._target_
    detector = locate(target) if isinstance(target, str) else target
    # A detector hands on what it doesn't know to the class that it extends.
    classes = [kind for kind in inspect.getmro(detector) if issubclass(kind, nn.Module)]
    found = [x for kind in classes for x in inspect.signature(kind).parameters.values()]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [x.name for x in found if x.kind not in several]
    if "iou_balanced" in names:
        names += [f"iou_balanced.{field.name}" for field in dataclasses.fields(LossOptions)]
    return [f"model.{name}" for name in names]


def check_override(word: str, keys: list[str]) -> None:
    """Refuse what detectron2 would add as a key that nothing reads."""
    key, equals, _ = word.partition("=")
    if not equals:
        raise UserError(f"{word!r} is no KEY=VALUE pair (flags stand before the first of those)")
    # Arguments of the model's parts may be left out in the file.
    node = key.rpartition(".")[0]
    open_nodes = [x for x in keys if x.startswith("model.") and x != "model.iou_balanced"]
    if key in keys or node in open_nodes:
        return
    close = difflib.get_close_matches(key, keys, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown key {key!r}{hint}")


def build_evaluator(cfg: DictConfig, name: str, output_dir: str) -> DatasetEvaluator:
    """The config's own ``dataloader.evaluator``; in place of detectron2's COCOEvaluator ours."""
    node = cfg.dataloader.get("evaluator")
    target = node._target_ if node is not None else COCOEvaluator
    kind = locate(target) if isinstance(target, str) else target
    if kind is not COCOEvaluator:
        evaluator: DatasetEvaluator = instantiate(node)
        return evaluator
    limits = node.get("max_dets_per_image") if node is not None else None
    return BoxEvaluator(name, output_dir, max_dets_per_image=limits)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """AP over IoU thresholds on the data set of ``dataloader.test``."""
    name = cfg.dataloader.test.dataset.names
    output_dir = os.path.join(cfg.train.output_dir, "inference", name)
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, build_evaluator(cfg, name, output_dir))
    if comm.is_main_process():
        print_csv_format(results)
    return dict(results)


def build_hooks(
    cfg: DictConfig, model: nn.Module, checkpointer: RobustCheckpointer
) -> list[hooks.HookBase]:
    built = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
    ]
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        built.insert(2, hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
        built.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    return built


def train(cfg: DictConfig, model: nn.Module, *, resume: bool) -> None:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    if comm.get_world_size() > 1:
        # detectron2 would give it this process's number, also where that is no GPU.
        gpu = {} if cfg.train.device.startswith("cuda") else {"device_ids": None}
        model = create_ddp_model(model, **cfg.train.ddp, **gpu)
    precision = torch.float16 if cfg.train.amp.enabled else None
    loader = instantiate(cfg.dataloader.train)
    trainer = StepTrainer(model, loader, optimizer, precision=precision)
    checkpointer = RobustCheckpointer(
        model, cfg.train.output_dir, trainer=trainer, iou_balanced=LossState(model)
    )
    trainer.register_hooks(build_hooks(cfg, model, checkpointer))
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    trainer.train(trainer.iter + 1 if checkpointer.resumed else 0, cfg.train.max_iter)


def main(args: argparse.Namespace) -> None:
    """The run, in each process."""
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    import_projects()
    cfg = load(args)
    if args.eval_only:
        model = set_up(cfg, args)
        checkpointer = RobustCheckpointer(model, cfg.train.output_dir, strict=True)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        evaluate(cfg, model)
        return
    with one_training(cfg.train.output_dir, args, cfg.train.init_checkpoint) as resume:
        train(cfg, set_up(cfg, args), resume=resume)


def set_up(cfg: DictConfig, args: argparse.Namespace) -> nn.Module:
    """Logs in the output folder, and the model on its device."""
    setup_loggers(cfg.train.output_dir)
    default_setup(cfg, args)
    model: nn.Module = instantiate(cfg.model).to(cfg.train.device)
    return model


def facts_of(cfg: DictConfig, args: argparse.Namespace) -> dict[str, str]:
    """What must be the same in all processes: all but files and folders."""
    flat = flatten(OmegaConf.to_container(cfg))
    own = ("train.output_dir", "train.init_checkpoint")
    # A function's text has its address in it, which differs from process to process.
    text = {key: re.sub(" at 0x[0-9a-f]+", "", str(value)) for key, value in flat.items()}
    facts = {key: value for key, value in text.items() if key not in own}
    return {"--eval-only": str(args.eval_only), **facts}


def run() -> int:
    """Check, then launch; a user's mistake is one line and exit code 2."""
    parser = launch_argument_parser()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = __doc__, key_help()
    args = parser.parse_args()
    try:
        placement = find_placement(args)
        cfg = load(args)
        check_output_dir(cfg.train.output_dir)
        return launch(main, args, placement, device=cfg.train.device, facts=facts_of(cfg, args))
    except UserError as error:
        print(f"lazyconfig_train_net.py: error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())
