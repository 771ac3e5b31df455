"""Hooks for the best checkpoint and the losses on the test sets; logs on a full disk."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from detectron2.utils.logger import log_first_n
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..data.loading import CheckedMapper, load_training_dicts
from ..files import write_atomically
from ..modeling import interface_of
from .checkpoint import RobustCheckpointer
from .train_step import autocast, precision_of

logger = logging.getLogger(__name__)

Inputs = list[dict[str, Any]]
# Layers that differ between training and inference.
_NOISY_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class _UntaggedCheckpointer(RobustCheckpointer):
    """Saves what another checkpointer saves, in files that ``--resume`` ignores."""

    def __init__(self, checkpointer: Checkpointer):
        super().__init__(checkpointer.model, checkpointer.save_dir)
        self.checkpointables = checkpointer.checkpointables

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class BestCheckpointer(hooks.BestCheckpointer):
    """detectron2's hook that keeps ``model_best.pth``, in the main process.

    ``model_best.json`` beside it has the best value, which a resumed training compares with.

    Args:
        eval_period: iterations between evaluations, 0 for one after the training only.
        checkpointer: the training's.
        metric: "task/name", e.g. "bbox/AP75", with several test sets "data set/task/name"; the
            largest value is best, of a "validation/..." loss the smallest.
    """

    trainer: TrainerBase
    best_metric: float | None
    best_iter: int | None

    def __init__(self, eval_period: int, checkpointer: Checkpointer, metric: str):
        mode = "min" if metric.startswith("validation/") else "max"
        super().__init__(eval_period, _UntaggedCheckpointer(checkpointer), metric, mode)
        self._logger = logger
        self._file = os.path.join(checkpointer.save_dir, "model_best.json")

    def before_train(self) -> None:
        """Read the best value of the training that is resumed."""
        if self.trainer.start_iter == 0:
            return
        with contextlib.suppress(OSError, ValueError), open(self._file, encoding="utf-8") as f:
            best = json.load(f)
            if best["metric"] == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]

    def _best_checking(self) -> None:
        before = self.best_metric, self.best_iter
        super()._best_checking()
        if (self.best_metric, self.best_iter) != before:  # model_best.pth is on the disk
            best = {"metric": self._val_metric, "value": self.best_metric}
            content = json.dumps({**best, "iteration": self.best_iter}).encode()
            write_atomically(self._file, lambda f: f.write(content))


def build_validation_loader(cfg: CfgNode) -> Iterable[Inputs]:
    """The images of DATASETS.TEST with their annotations, resized as in inference.

    Each process reads its share, in batches of the training's size: losses are divided by the
    number of positives of such a batch.
    """
    as_training = cfg.clone()
    as_training.defrost()
    as_training.DATASETS.TRAIN = cfg.DATASETS.TEST
    as_training.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    augmentations = interface_of(detector).build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(
        is_train=True,  # keeps the annotations
        augmentations=augmentations or build_augmentation(cfg, is_train=False),
        image_format=cfg.INPUT.FORMAT,
    )
    return build_detection_test_loader(
        load_training_dicts(as_training),
        mapper=CheckedMapper(mapper),
        batch_size=max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def validation_losses(
    model: nn.Module, loader: Iterable[Inputs], batch_size: int
) -> dict[str, Any]:
    """Mean losses of a model over a data set; the model's state does not change.

    Args:
        model: the detector, wrapped in DDP or not.
        loader: training inputs; this process's share.
        batch_size: images of a full batch; a smaller last batch repeats its images.

    Returns:
        {"validation": {loss's name: mean over all processes' images, ..., "total_loss": sum}} on
        the main process, {} on others and without any image.
    """
    model = getattr(model, "module", model)
    sums: dict[str, float] = {}
    num_images = 0
    # A storage of its own, as what the detector logs here is not of the training.
    with torch.no_grad(), losses_without_trace(model), EventStorage():
        for inputs in loader:
            full = [inputs[i % len(inputs)] for i in range(max(batch_size, len(inputs)))]
            for name, loss in model(full).items():
                sums[name] = sums.get(name, 0.0) + float(loss) * len(inputs)
            num_images += len(inputs)
    gathered = comm.gather((sums, num_images))
    total = sum(n for _, n in gathered)
    if not total:
        return {}
    names = {name: None for part, _ in gathered for name in part}
    means = {name: sum(p.get(name, 0.0) for p, _ in gathered) / total for name in names}
    return {"validation": {**means, "total_loss": sum(means.values())}}


@contextlib.contextmanager
def losses_without_trace(model: nn.Module) -> Iterator[None]:
    """A detector returns losses here, with normalisation and dropout as in inference.

    Afterwards each module's mode and plain numbers are restored; detectron2's dense detectors keep
    the losses' normaliser as such a number.
    """
    numbers = [(module, _numbers(module)) for module in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, _NOISY_LAYERS):
            module.eval()
    try:
        yield
    finally:
        for module, before in numbers:
            for name in _numbers(module).keys() - before.keys():
                delattr(module, name)
            vars(module).update(before)


def _numbers(module: nn.Module) -> dict[str, float]:
    return {name: x for name, x in vars(module).items() if isinstance(x, int | float)}


def _validation_hook(cfg: CfgNode, model: nn.Module) -> hooks.EvalHook:
    """Logs the losses on DATASETS.TEST every TEST.LOSS_PERIOD iterations; for all processes."""
    loaders: list[Iterable[Inputs]] = []

    def compute() -> dict[str, Any]:
        if not loaders:  # data sets are read on first use
            loaders.append(build_validation_loader(cfg))
        batch_size = max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1)
        with autocast(model, precision_of(cfg)):
            return validation_losses(model, loaders[0], batch_size)

    return hooks.EvalHook(cfg.TEST.LOSS_PERIOD, compute)


def evaluation_hooks(cfg: CfgNode, model: nn.Module, checkpointer: Checkpointer) -> list[HookBase]:
    """This process's hooks of TEST.LOSS_PERIOD and TEST.BEST_METRIC, to run before the writers."""
    chosen: list[HookBase] = [_validation_hook(cfg, model)] if cfg.TEST.LOSS_PERIOD > 0 else []
    metric = cfg.TEST.BEST_METRIC
    if metric and comm.is_main_process():
        on_loss, at_end = metric.startswith("validation/"), metric.startswith("tta/")
        period = cfg.TEST.LOSS_PERIOD if on_loss else 0 if at_end else cfg.TEST.EVAL_PERIOD
        chosen.append(BestCheckpointer(period, checkpointer, metric))
    return chosen


class FaultTolerantWriter(EventWriter):
    """A writer of detectron2 that on a full disk warns once; the training goes on."""

    def __init__(self, writer: EventWriter):
        self._writer = writer

    def write(self) -> None:
        """Write the newest scalars."""
        self._try(self._writer.write)

    def close(self) -> None:
        """Close the file."""
        self._try(self._writer.close)

    def _try(self, function: Callable[[], None]) -> None:
        try:
            function()
        except OSError as error:
            # What TensorBoard's writer has not taken would pile up.
            get_event_storage().clear_images()
            get_event_storage().clear_histograms()
            message = (
                f"{type(self._writer).__name__}'s file in OUTPUT_DIR can't be written: {error}; "
                "the training goes on, what could not be written is missing there"
            )
            log_first_n(logging.WARNING, message, name=__name__, key="message")
