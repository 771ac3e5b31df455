"""What the losses have learned of a training, in its checkpoints."""

from typing import Any

from torch import nn

from ..modeling import IoUBalancedLoss


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
