"""DefaultTrainer with what IoU-balanced training adds."""

import logging
import os
import signal
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from ..data import prepare_dataset
from ..data.loading import CheckedMapper, build_mapper, load_training_dicts
from ..evaluation import BoxEvaluator
from ..modeling import IoUBalancedLoss
from ..modeling.test_time_augmentation import DenseDetectorWithTTA
from .checkpoint import RobustCheckpointer, write_atomically
from .ema import WeightsAverage, weights_replaced
from .hooks import evaluation_hooks
from .precision import MixedPrecisionTrainer
from .signals import Stopped, StopSignals
from .stream import ResumableLoader, seed_step
from .visualization import visualization_hooks

logger = logging.getLogger(__name__)

# Iterations after which several processes ask each other whether one of them got a signal.
_AGREE_PERIOD = 10


class LossState:
    """The losses' training state as a checkpointable, saved and resumed beside the weights.

    Not part of the weights: fine-tuning starts with a state of its own.
    """

    def __init__(self, model: nn.Module):
        """Find the losses of a model.

        Args:
            model: the detector, wrapped in DDP or not; it may hold no IoU-balanced loss at all.
        """
        self.losses = [m for m in model.modules() if isinstance(m, IoUBalancedLoss)]

    def state_dict(self) -> dict[str, Any]:
        """The state of each loss, in the order of the model's modules."""
        return {"losses": [loss.training_state() for loss in self.losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; a plain detector's checkpoint has nothing to load."""
        for loss, loss_state in zip(self.losses, state["losses"], strict=bool(state["losses"])):
            loss.load_training_state(loss_state)


class SeedState:
    """The seed of the data's stream as a checkpointable, for SEED -1: detectron2 draws one then."""

    def __init__(self, loader: ResumableLoader, seed: int):
        """Set whose seed it is.

        Args:
            loader: the training's.
            seed: SEED of the config; only a negative one is replaced by a checkpoint's.
        """
        self._loader = loader
        self._fixed = seed >= 0

    def state_dict(self) -> dict[str, int]:
        """The seed."""
        return {"seed": self._loader.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the seed of a checkpoint."""
        if not self._fixed:
            self._loader.seed = state["seed"]


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer for trainings that are interrupted, with COCO evaluation.

    A resumed training goes on as if it had not been stopped: see docs/robustness.md.
    """

    def __init__(self, cfg: CfgNode, *, trust_checkpoint: bool = False):
        """Build model, optimizer, data loader, checkpointer and hooks.

        (Not by DefaultTrainer's own, which leaves no choice of checkpointer and AMPTrainer.)

        Args:
            cfg: the full config.
            trust_checkpoint: read checkpoints that hold any Python objects; that can run code.
        """
        super(DefaultTrainer, self).__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.loader = self.build_train_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        kind = partial(MixedPrecisionTrainer, cfg) if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = kind(model, self.loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RobustCheckpointer(
            model, cfg.OUTPUT_DIR, trust=trust_checkpoint, trainer=weakref.proxy(self)
        )
        self.checkpointer.add_checkpointable("iou_balanced", LossState(model))
        self.checkpointer.add_checkpointable("data", SeedState(self.loader, cfg.SEED))
        self.average = WeightsAverage(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self._signals = StopSignals()
        self._last_done = -1  # the last iteration whose result is complete
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from OUTPUT_DIR, with the data going on where they were, or load MODEL.WEIGHTS.

        Args:
            resume: whether to look for a checkpoint.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self._last_done = self.iter
            self.start_iter = self.loader.start_iter = self.iter + 1
        if self.average is not None:
            self.average.start()

    def train(self) -> dict[str, Any] | None:
        """Run training.

        Returns:
            the results, where TEST.EXPECTED_RESULTS are given; exits with 128 + the signal's number
            on SIGTERM and SIGINT, when a checkpoint is written.
        """
        try:
            with self._signals:
                results: dict[str, Any] | None = super().train()
        except Stopped as stopped:
            self._exit(stopped.signum)
        if self.average is not None and comm.is_main_process():
            content = {"model": self.average.state_dict()}
            path = os.path.join(self.cfg.OUTPUT_DIR, "model_ema.pth")
            write_atomically(path, partial(torch.save, content))
        return results

    def _exit(self, signum: int) -> None:
        """Save what is done, and say so."""
        name = f"model_{self._last_done:07d}"
        if self.start_iter <= self._last_done < self.max_iter - 1:  # else there is a newer file
            self.checkpointer.save(name, iteration=self._last_done)
        logger.warning(
            f"stopped by {signal.Signals(signum).name} at iteration {self._last_done}; "
            "--resume goes on"
        )
        raise SystemExit(128 + signum)

    def before_step(self) -> None:
        """detectron2's; from here a signal waits for the end of the step."""
        self._signals.interruptible = False
        super().before_step()

    def run_step(self) -> None:
        """One step, with what is random in it given by SEED and the iteration."""
        seed_step(self.loader.seed, self.iter)
        super().run_step()
        if self.average is not None:
            self.average.update()

    def after_step(self) -> None:
        """detectron2's hooks; where evaluation starts, all that a checkpoint holds is done.

        A single process may be stopped anywhere from there on, several only together.
        """
        alone = comm.get_world_size() == 1
        for hook in self._hooks:
            if isinstance(hook, hooks.EvalHook) and self._last_done < self.iter:
                self._last_done = self.iter
                # At the end of the training it is after_train that stops.
                if self.iter < self.max_iter - 1 and (alone or self.iter % _AGREE_PERIOD == 0):
                    self._signals.check()
                self._signals.interruptible = alone
            hook.after_step()

    def after_train(self) -> None:
        """detectron2's hooks; after a signal without the last evaluation."""
        if self.iter >= self.max_iter:
            self._signals.check()
            self._signals.interruptible = comm.get_world_size() == 1
        super().after_train()

    @classmethod
    def test_average(
        cls, cfg: CfgNode, model: nn.Module, average: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Evaluate averaged weights; detections go to ``OUTPUT_DIR/ema``.

        Args:
            cfg: the full config.
            model: the detector, which keeps its own weights.
            average: by the names of its ``state_dict``.

        Returns:
            {"ema": results}.
        """
        logger.info("Evaluation of the moving average of the weights")
        with weights_replaced(model, average):
            return {"ema": cls.test(_with_output(cfg, "ema"), model)}

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation; detections go to ``OUTPUT_DIR/tta``.

        Args:
            cfg: the full config; see TEST.AUG.
            model: the detector.

        Returns:
            {"tta": results}.

        Raises:
            UserError: if it is no dense detector.
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
        """detectron2's hooks, and those of TEST.LOSS_PERIOD and TEST.BEST_METRIC.

        Writers stay last, as they write what the other hooks have put into the storage.
        """
        built = super().build_hooks()
        writers = [hook for hook in built if isinstance(hook, hooks.PeriodicWriter)]
        others = [hook for hook in built if hook not in writers]
        return [
            *others,
            *self._further_evaluations(),
            *visualization_hooks(self.cfg, self.model),
            *evaluation_hooks(self.cfg, self.model, self.checkpointer),
            *writers,
        ]

    def _further_evaluations(self) -> list[HookBase]:
        """Of the average as often as of the weights; with augmentation at the end."""
        cfg, model, average = self.cfg, self.model, self.average
        chosen: list[HookBase] = []
        if average is not None:
            test = lambda: self.test_average(cfg, model, average.state_dict())  # noqa: E731
            chosen.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test))
        if cfg.TEST.AUG.ENABLED:
            chosen.append(hooks.EvalHook(0, partial(self.test_with_tta, cfg, model)))
        return chosen

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        """detectron2's loader without bad boxes; an image that can't be read is named."""
        mapper = CheckedMapper(build_mapper(cfg, is_train=True))
        return ResumableLoader(cfg, load_training_dicts(cfg), mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """detectron2's loader; an image that can't be read is named."""
        mapper = CheckedMapper(build_mapper(cfg, is_train=False), dataset_name)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """detectron2's optimizer, and CLIP_TYPE "full_model".

        "full_model" clips the norm of all gradients together, as the paper's set-up does;
        detectron2's "norm" clips each parameter's by itself.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
            return super().build_optimizer(cfg, model)
        unclipped = cfg.clone()
        unclipped.defrost()
        unclipped.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(unclipped, model)

        def clip_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer


def _with_output(cfg: CfgNode, folder: str) -> CfgNode:
    """The config with a folder in OUTPUT_DIR for OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, folder)
    return cfg
