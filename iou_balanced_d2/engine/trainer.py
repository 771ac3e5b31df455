"""detectron2's DefaultTrainer for trainings that are interrupted."""

import contextlib
import copy
import logging
import os
import signal
import warnings
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor, nn

from ..analysis.curves import write_curves
from ..data import prepare_dataset, register_datasets_of
from ..data.loading import CheckedMapper, build_mapper, load_training_dicts
from ..data.resumable_loader import Mapper, ResumableLoader, SeedState, as_loader, seed_step
from ..errors import UserError
from ..evaluation import BoxEvaluator
from ..files import remove_unfinished, write_atomically
from ..modeling import DenseDetectorWithTTA
from .agreement import RunState, check_same_data
from .checkpoint import LossState, RobustCheckpointer
from .console import FirstIterations, describe_data
from .faults import lost_connection
from .hooks import FaultTolerantWriter, evaluation_hooks
from .optimizer import WeightsAverage, build_optimizer
from .signals import Stopped, outlive_in_worker
from .train_step import StepTrainer, precision_of
from .visualization import visualization_hooks

logger = logging.getLogger(__name__)

# Values kept of each scalar. detectron2 keeps a million, so memory grows for weeks; its printer
# looks at 1000.
_KEPT_VALUES = 1000


class Trainer(DefaultTrainer):
    """Trains and evaluates. A resumed training is as if it had not stopped: docs/robustness.md.

    Args:
        cfg: the full config.
        trust_checkpoint: read checkpoints that hold any Python objects; that can run code.
    """

    _hooks: list[HookBase]

    def __init__(self, cfg: CfgNode, *, trust_checkpoint: bool = False):
        super(DefaultTrainer, self).__init__()  # its own leaves no choice of checkpointer
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        register_datasets_of(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.loader = as_loader(self.build_train_loader(cfg), cfg.SEED)
        # PyTorch is about to rename it.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        gpus = [torch.cuda.current_device()] if cfg.MODEL.DEVICE.startswith("cuda") else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=gpus)
        self._trainer = StepTrainer(model, self.loader, optimizer, precision=precision_of(cfg))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RobustCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            trust=trust_checkpoint,
            run=RunState(cfg),
            trainer=weakref.proxy(self),
        )
        self.checkpointer.add_checkpointable("iou_balanced", LossState(model))
        self.checkpointer.add_checkpointable("data", SeedState(self.loader, cfg.SEED))
        self.average = WeightsAverage(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self._signals = self._trainer.signals
        self._last_done = -1  # the last iteration that a checkpoint may hold
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from OUTPUT_DIR's last checkpoint, also the data, or else load MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self._last_done = self.iter
            self.start_iter = self.loader.start_iter = self.iter + 1
            if self.start_iter >= self.max_iter:
                logger.warning(
                    f"the checkpoint is of iteration {self.iter}, the last of SOLVER.MAX_ITER "
                    f"{self.max_iter}: nothing is left to train, only to evaluate"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; the config's learning rate and schedule go on at the checkpoint's iteration."""
        if not isinstance(state_dict["iteration"], int) or state_dict["iteration"] < 0:
            raise ValueError(f"iteration {state_dict['iteration']!r}")
        super().load_state_dict(state_dict)
        if isinstance(self.scheduler, LRMultiplier):
            groups = self.optimizer.param_groups
            self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            self.scheduler.last_epoch = self.iter + 1
            for group, rate in zip(groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate

    def train(self) -> dict[str, Any] | None:
        """Run training.

        Returns:
            the results, where TEST.EXPECTED_RESULTS are given; exits with 128 + the signal's number
            on SIGTERM and SIGINT, when a checkpoint is written.
        """
        with self._signals:
            try:
                results: dict[str, Any] | None = super().train()
            except Stopped as stopped:
                self._exit(stopped.signum, together=stopped.together)
            except Exception as error:
                self._save_if_left_alone(error)
                raise
        return results

    def _exit(self, signum: int, *, together: bool) -> NoReturn:
        """Save, and end this process when the checkpoint is on the disk."""
        self._save_done()
        if together:  # the launcher ends the others when the first process ends
            with contextlib.suppress(RuntimeError):  # the main process prints its error
                comm.synchronize()
        logger.warning(
            f"stopped by {signal.Signals(signum).name} at iteration {self._last_done}; "
            "--resume goes on"
        )
        raise SystemExit(128 + signum)

    def _save_done(self) -> None:
        if self.start_iter <= self._last_done < self.max_iter - 1:
            self.checkpointer.save(f"model_{self._last_done:07d}", iteration=self._last_done)

    def _save_if_left_alone(self, error: Exception) -> None:
        """Save if another process has ended during an evaluation, e.g. after a signal."""
        in_evaluation = self._last_done >= min(self.iter, self.max_iter - 1)
        if not (in_evaluation and (reason := lost_connection(error))):
            return
        self._signals.ignore()
        if self._signals.received is not None:
            self._exit(self._signals.received, together=False)
        if comm.is_main_process():
            self._save_done()
            raise UserError(
                f"lost the connection to another process in an evaluation ({reason}): iteration "
                f"{self._last_done} is saved, --resume goes on from there; see the other "
                "processes' and hosts' output for the cause"
            ) from error

    def before_train(self) -> None:
        """detectron2's, with less memory for scalars."""
        if comm.is_main_process():
            remove_unfinished(self.cfg.OUTPUT_DIR)
        self.storage._history.default_factory = partial(HistoryBuffer, max_length=_KEPT_VALUES)
        if self.average is not None:
            self.average.start()
        super().before_train()

    def before_step(self) -> None:
        """detectron2's hooks; SEED and the iteration seed the step."""
        super().before_step()
        seed_step(self.loader.seed, self.iter)

    def after_step(self) -> None:
        """detectron2's hooks; a signal stops the training before its evaluations."""
        if self.average is not None:
            self.average.update()
        for hook in self._hooks:
            if isinstance(hook, hooks.EvalHook) and self._last_done < self.iter:
                self._last_done = self.iter
                if self.iter < self.max_iter - 1:  # else after_train does
                    self._signals.check()
            hook.after_step()

    def after_train(self) -> None:
        """detectron2's hooks and model_ema.pth; no evaluation after a signal or an error."""
        complete = self.iter >= self.max_iter
        if complete:
            self._signals.check()
        else:
            self._hooks = [h for h in self._hooks if not isinstance(h, hooks.EvalHook)]
        super().after_train()
        if complete and comm.is_main_process():
            if self.average is not None:
                content = {"model": self.average.state_dict()}
                path = os.path.join(self.cfg.OUTPUT_DIR, "model_ema.pth")
                write_atomically(path, partial(torch.save, content))
            write_curves(self.cfg.OUTPUT_DIR)

    @classmethod
    def test_average(
        cls, cfg: CfgNode, model: nn.Module, average: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Evaluate averaged weights to {"ema": results}; detections go to ``OUTPUT_DIR/ema``."""
        logger.info("Evaluation of the moving average of the weights")
        # In a copy, as the model is saved if a signal comes.
        averaged = copy.deepcopy(getattr(model, "module", model))
        averaged.load_state_dict(average)
        return {"ema": cls.test(_with_output(cfg, "ema"), averaged)}

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with TEST.AUG to {"tta": results}; detections go to ``OUTPUT_DIR/tta``.

        Raises:
            UserError: if the model is no dense detector.
        """
        logger.info("Evaluation with test-time augmentation")
        augmented = DenseDetectorWithTTA(cfg, model)
        return {"tta": cls.test(_with_output(cfg, "tta"), augmented)}

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """AP over IoU thresholds; detections go to ``OUTPUT_DIR/inference/<data set>``."""
        prepare_dataset(dataset_name)
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return BoxEvaluator(dataset_name, output_dir, difficult=cfg.DATASETS.VOC_DIFFICULT)

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's hooks and this project's; the writers last."""
        built = super().build_hooks()
        writers = [hook for hook in built if isinstance(hook, hooks.PeriodicWriter)]
        ordered = [
            *[hook for hook in built if hook not in writers],
            *self._further_evaluations(),
            FirstIterations(),
            *visualization_hooks(self.cfg, self.model),
            *evaluation_hooks(self.cfg, self.model, self.checkpointer),
            *writers,
        ]
        for hook in ordered:
            if isinstance(hook, hooks.EvalHook):
                hook._func = self._signals.interruptible(hook._func)
        return ordered

    def build_writers(self) -> list[EventWriter]:
        """detectron2's; a full disk does not end the training."""
        return [FaultTolerantWriter(writer) for writer in super().build_writers()]

    def _further_evaluations(self) -> list[HookBase]:
        """The average is evaluated as often as the weights; test-time augmentation at the end."""
        cfg, model, average = self.cfg, self.model, self.average
        chosen: list[HookBase] = []
        if average is not None:
            test = lambda: self.test_average(cfg, model, average.state_dict())  # noqa: E731
            chosen.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test))
        if cfg.TEST.AUG.ENABLED:
            chosen.append(hooks.EvalHook(0, partial(self.test_with_tta, cfg, model)))
        return chosen

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, mapper: Mapper | None = None
    ) -> Iterable[list[dict[str, Any]]]:
        """A loader that resumes and leaves out bad boxes; its errors name the image.

        Args:
            cfg: the full config.
            mapper: makes a training example of a dataset dict; default: detectron2's, or that of
                the detector.

        Returns:
            batches; a subclass may return any other loader.

        Raises:
            UserError: if another process has other data.
        """
        register_datasets_of(cfg)
        mapper = CheckedMapper(mapper or build_mapper(cfg, is_train=True))
        dicts = load_training_dicts(cfg)
        check_same_data(dicts)
        describe_data(cfg, dicts)
        return ResumableLoader(cfg, dicts, mapper, init_worker=outlive_in_worker)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """detectron2's loader; its errors name the image."""
        register_datasets_of(cfg)
        mapper = CheckedMapper(build_mapper(cfg, is_train=False), dataset_name)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """detectron2's optimizer, and CLIP_TYPE "full_model"."""
        return build_optimizer(cfg, model)


def _with_output(cfg: CfgNode, folder: str) -> CfgNode:
    """The config with a folder of OUTPUT_DIR as OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, folder)
    return cfg
