"""detectron2's optimizer, with gradients clipped as in the paper's set-up."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """detectron2's optimizer, and CLIP_TYPE "full_model".

    "full_model" clips the norm of all gradients together, as the paper's set-up does;
    detectron2's "norm" clips each parameter's by itself.

    Args:
        cfg: the full config; see SOLVER.
        model: whose parameters are optimized.

    Returns:
        the optimizer, which clips before its steps.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return build_detectron2_optimizer(cfg, model)
    unclipped = cfg.clone()
    unclipped.defrost()
    unclipped.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer: torch.optim.Optimizer = build_detectron2_optimizer(unclipped, model)

    def clip_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer
