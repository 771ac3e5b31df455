"""The moving average of the weights over the training."""

from typing import Any

import torch
from torch import Tensor, nn


class WeightsAverage:
    """Exponential moving average of a model's weights and normalisation statistics.

    After each step ``average = decay * average + (1 - decay) * weights``, from the weights that
    the training starts from. A checkpointable.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Set what is averaged.

        Args:
            model: the detector, wrapped in DDP or not.
            decay: in [0, 1).
        """
        self._model = getattr(model, "module", model)
        self._decay = decay
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self) -> None:
        """Start from the weights as they are now, unless an average has been resumed."""
        if not self._average:
            self._average = {k: v.clone() for k, v in self._model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average on after a step; counters are taken as they are."""
        for name, value in self._model.state_dict().items():
            if value.is_floating_point():
                self._average[name].lerp_(value, 1 - self._decay)
            else:
                self._average[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by the names of the model's ``state_dict``."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the average of a checkpoint."""
        own = self._model.state_dict()
        self._average = {k: v.to(own[k].device, copy=True) for k, v in state.items()}
