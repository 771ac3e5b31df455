"""Mixed precision in float16 or bfloat16, on GPU or CPU."""

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .step import StepTrainer

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = tuple(_DTYPES)


def autocast(cfg: CfgNode) -> torch.autocast:
    """The context of SOLVER.AMP: matrix products in low precision, if it is enabled.

    Args:
        cfg: the full config.

    Returns:
        a context, without effect with SOLVER.AMP.ENABLED False.
    """
    enabled = cfg.SOLVER.AMP.ENABLED
    # PyTorch 2.0 refuses float16 on a CPU also where it is to have no effect.
    dtype = _DTYPES[cfg.SOLVER.AMP.PRECISION] if enabled else None
    return torch.autocast(_device_type(cfg), dtype=dtype, enabled=enabled)


def _device_type(cfg: CfgNode) -> str:
    return str(cfg.MODEL.DEVICE).split(":")[0]


class MixedPrecisionTrainer(StepTrainer):
    """The losses in mixed precision; unlike detectron2's AMPTrainer without need of CUDA.

    float16 needs the gradients scaled up; bfloat16 has the range of float32 and does not. A
    checkpoint of any precision resumes in any other.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer
    ):
        """Set the precision.

        Args:
            cfg: the full config.
            model: the detector, wrapped in DDP or not.
            data_loader: an iterable of batches.
            optimizer: of the model.
        """
        super().__init__(model, data_loader, optimizer)
        scaling = cfg.SOLVER.AMP.PRECISION == "float16"  # checked to be on a GPU
        amp = torch.amp if hasattr(torch.amp, "GradScaler") else torch.cuda.amp  # before torch 2.3
        self.grad_scaler = amp.GradScaler(enabled=scaling)
        self._cfg = cfg

    def compute_gradients(self, batch: Any) -> dict[str, Tensor]:
        """Forward in mixed precision, and backward.

        Args:
            batch: the model's input.

        Returns:
            the losses by name.
        """
        with autocast(self._cfg):
            losses: dict[str, Tensor] = self.model(batch)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        return losses

    def update_weights(self) -> None:
        """The optimizer's step, left out where scaled gradients have overflown."""
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """As detectron2's AMPTrainer has it."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a checkpoint; one without float16 has no scale, which then starts afresh."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
