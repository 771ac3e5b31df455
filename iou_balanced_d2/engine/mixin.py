"""What another trainer than ours needs for these losses and keys."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from torch import nn

from ..config import add_iou_balanced_config
from ..data import register_datasets_of
from .checkpoint import LossState
from .checks import warn_unused_losses
from .config import flatten
from .optimizer import build_optimizer

logger = logging.getLogger(__name__)

#: Keys that only :class:`~iou_balanced_d2.engine.Trainer` and train_net.py read; docs/config.md has
#: them in a table.
TRAINER_KEYS = (
    "DATASETS.VOC_DIFFICULT",
    "INPUT.SSD_AUG",
    "MODEL.EMA.ENABLED",
    "SOLVER.AMP.PRECISION",
    "TEST.ALIGNMENT_REPORT",
    "TEST.AUG.ENABLED",
    "TEST.BEST_METRIC",
    "TEST.LOSS_PERIOD",
    "VIS_PERIOD",
)


class TrainerMixin:
    """For a trainer that extends detectron2's DefaultTrainer: ``class Mine(TrainerMixin, ...)``.

    The losses' state (w_loc) is saved and resumed, the config's own data sets are registered, and
    SOLVER.CLIP_GRADIENTS.CLIP_TYPE takes "full_model". A warning names each key that has been set
    but that only this package's Trainer reads.

    Args:
        cfg: the full config.
    """

    checkpointer: Any
    model: nn.Module

    def __init__(self, cfg: CfgNode):
        defaults = get_cfg()
        add_iou_balanced_config(defaults)
        before, now = flatten(defaults), flatten(cfg)
        for key in TRAINER_KEYS:
            if now[key] != before[key]:
                logger.warning(
                    f"{key} {now[key]!r} has no effect here: only iou_balanced_d2's Trainer reads "
                    "it (docs/config.md)"
                )
        register_datasets_of(cfg)
        super().__init__(cfg)  # type: ignore[call-arg]
        warn_unused_losses(cfg, self.model)
        self.checkpointer.add_checkpointable("iou_balanced", LossState(self.model))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the trainer that is extended, and CLIP_TYPE "full_model"."""
        return build_optimizer(cfg, model, super().build_optimizer)  # type: ignore[misc]

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """The loader of the trainer that is extended; without a training nothing is registered."""
        register_datasets_of(cfg)
        loader: Iterable[list[dict[str, Any]]] = super().build_test_loader(  # type: ignore[misc]
            cfg, dataset_name
        )
        return loader
