"""DefaultTrainer with what IoU-balanced training adds."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from ..data import prepare_dataset
from ..data.loading import CheckedMapper, build_mapper, load_training_dicts
from ..evaluation import BoxEvaluator
from ..modeling import IoUBalancedLoss
from .hooks import evaluation_hooks
from .visualization import visualization_hooks


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


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer with COCO evaluation and the losses' state in checkpoints."""

    def __init__(self, cfg: CfgNode):
        """Build model, optimizer, data loader and hooks.

        Args:
            cfg: the full config.
        """
        super().__init__(cfg)
        self.checkpointer.add_checkpointable("iou_balanced", LossState(self.model))

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
            *visualization_hooks(self.cfg, self.model),
            *evaluation_hooks(self.cfg, self.model, self.checkpointer),
            *writers,
        ]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        """detectron2's loader without bad boxes; an image that can't be read is named."""
        mapper = CheckedMapper(build_mapper(cfg, is_train=True))
        return build_detection_train_loader(cfg, mapper=mapper, dataset=load_training_dicts(cfg))

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
