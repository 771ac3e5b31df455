"""The optimizer with the paper's clipping of gradients, and the average of the weights."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import Tensor, nn


def build_optimizer(
    cfg: CfgNode,
    model: nn.Module,
    build: Callable[[CfgNode, nn.Module], torch.optim.Optimizer] = build_detectron2_optimizer,
) -> torch.optim.Optimizer:
    """detectron2's optimizer or that of ``build``, with CLIP_TYPE "full_model" besides its own.

    "full_model" clips the norm of all gradients together, as in the paper; detectron2's "norm"
    clips each parameter's. The optimizer clips before its steps.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return build(cfg, model)
    unclipped = cfg.clone()
    unclipped.defrost()
    unclipped.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = build(unclipped, model)

    def clip_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


class WeightsAverage:
    """Exponential moving average of a model's weights and normalisation statistics.

    After each step ``average = decay * average + (1 - decay) * weights``. A checkpointable.

    Args:
        model: the detector, wrapped in DDP or not.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = getattr(model, "module", model)
        self._decay = decay
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self) -> None:
        """Start from the weights of now, unless an average has been resumed."""
        if not self._average:
            self._average = {k: v.clone() for k, v in self._model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a step; counters are copied."""
        for name, value in self._model.state_dict().items():
            if value.is_floating_point():
                self._average[name].lerp_(value, 1 - self._decay)
            else:
                self._average[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, as a ``state_dict`` of the model."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the average of a checkpoint."""
        own = self._model.state_dict()
        if any(state[name].shape != value.shape for name, value in own.items()):
            raise ValueError("the shapes of some weights differ")
        self._average = {k: state[k].to(v.device, copy=True) for k, v in own.items()}
