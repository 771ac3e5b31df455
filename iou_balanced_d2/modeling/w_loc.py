"""w_loc of eq. 4: set by the user, or measured over the first steps of the training."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import LossOptions, iou_balanced_loc_weights

# Below this share of the plain loss the boxes hardly overlap their ground truth yet (FCOS starts
# at IoU 0), and a w_loc measured there would be over 10 and blow up the loss of later steps.
MIN_BALANCED_SHARE = 0.1
# Heads that start at noise (with normalisation layers) gave 5.5 and more and worse detectors.
_LARGE_W_LOC = 5.0
_MEASURED_WITH = ("loc_lambda", "loc_weight_rule", "loc_weight_steps")
# Causes of a large value, and what to do.
_BAD_ANCHORS = (
    "the anchors overlap the objects little (tools/check_dataset.py says how many they match)",
    "anchors that fit the objects",
)
_BAD_BOXES = (
    "the first boxes are bad",
    "LOC_WEIGHT_RULE anchors (running, for a detector without anchors)",
)

logger = logging.getLogger(__name__)


class WLocMeasurement(nn.Module):
    """Measures w_loc, the constant that makes up for IoU^lambda <= 1 in the box loss.

    w_loc is sum(loss) / sum(iou^lambda * loss) over the positives of LOC_WEIGHT_STEPS steps, or of
    each step anew ("running"). The buffers are training state, not weights: see
    :class:`IoUBalancedLoss`.
    """

    w_loc: Tensor  #: float64 scalar; 0 until it is known
    #: (5,) float64, sums over the steps measured so far of 1, the box loss, iou^lambda * box loss,
    #: each step's own w_loc, and its square.
    sums: Tensor

    def __init__(self, options: LossOptions):
        """Start with the user's value, or with none.

        Args:
            options: loc_weight, loc_weight_rule, loc_weight_steps and loc_lambda are read.
        """
        super().__init__()
        self.options = options
        # With lambda 0 there is nothing to make up for.
        self._fixed = options.loc_weight or float(options.loc_lambda == 0)
        self._settled = self._fixed > 0
        self._num_updates = 0
        self._look_at = options.loc_weight_steps  # the update after which it may be known
        w_loc = torch.tensor(self._fixed, dtype=torch.float64)
        self.register_buffer("w_loc", w_loc, persistent=False)
        self.register_buffer("sums", torch.zeros(5, dtype=torch.float64), persistent=False)

    def measures_anchors(self) -> bool:
        """Whether the next step's sums are to be taken at the anchors instead of the boxes."""
        return self.options.loc_weight_rule == "anchors" and not self._settled

    @torch.no_grad()
    def update(self, loc_sum: Tensor, loc_balanced_sum: Tensor) -> None:
        """Add one training step to the measurement.

        Args:
            loc_sum: float64 scalar, plain box loss summed over the positives of all processes
                (or its mean over processes).
            loc_balanced_sum: the same of iou^lambda * loss.
        """
        if self._settled:
            return
        step_w_loc = loc_sum / loc_balanced_sum
        # Not usable: NaN sums (diverged deltas), sums of 0 (no positives), and values beyond the
        # weights' type, as inf * 0 would be NaN.
        usable = (loc_balanced_sum > 0) & torch.isfinite(step_w_loc.float())
        if self.options.loc_weight_rule == "running":
            self.w_loc.copy_(torch.where(usable, step_w_loc, 0.0))
            return
        usable &= loc_balanced_sum >= MIN_BALANCED_SHARE * loc_sum
        usable &= self.sums[0] < self.options.loc_weight_steps
        one = torch.ones_like(loc_sum)
        step = torch.stack([one, loc_sum, loc_balanced_sum, step_w_loc, step_w_loc**2])
        self.sums += torch.where(usable, step, 0.0)
        self.w_loc.copy_((self.sums[1] / self.sums[2]).nan_to_num(nan=0.0))
        self._settle()

    def _settle(self) -> None:
        """Log the final value; the host waits for the device only when it may be there."""
        self._num_updates += 1
        if self._num_updates < self._look_at:
            return
        num_steps, _, _, total, squares = self.sums.tolist()
        missing = self.options.loc_weight_steps - int(num_steps)
        self._look_at += missing
        if num_steps == 0 and self._num_updates == self.options.loc_weight_steps:
            logger.warning(
                f"w_loc could not be measured in {self._num_updates} steps: the boxes overlap "
                "their ground truth too little (w_loc over 10), or there were no positives. Until "
                "it can be, the box loss is the plain one. Consider anchors that fit the objects "
                "(tools/check_dataset.py), or MODEL.IOU_BALANCED.LOC_WEIGHT 2.0"
            )
        if missing:
            return
        self._settled = True
        spread = max(squares - total**2 / num_steps, 0.0) ** 0.5 / max(num_steps - 1, 1) ** 0.5
        error = spread / num_steps**0.5 / (total / num_steps)
        logger.info(
            f"w_loc measured: {float(self.w_loc):.4f} over {num_steps:.0f} steps (standard "
            f"deviation of the steps {spread:.2f}, relative standard error {error:.1%}); kept from "
            "now on"
        )
        if self.w_loc > _LARGE_W_LOC:
            cause, remedy = (
                _BAD_ANCHORS if self.options.loc_weight_rule == "anchors" else _BAD_BOXES
            )
            logger.warning(
                f"This w_loc is far above the paper's 2.3 to 3.0, as {cause}. Once boxes are good "
                "the box loss will weigh several times the plain one "
                "(iou_balanced/loc_mean_weight). Consider MODEL.IOU_BALANCED.LOC_WEIGHT 2.0, or "
                f"{remedy}"
            )

    def weights(self, iou: Tensor) -> Tensor:
        """Eq. 4, (P,) without gradient; 1 for all positives until w_loc is known."""
        w_loc = self.w_loc.to(iou.dtype)
        weights = iou_balanced_loc_weights(iou, lambda_=self.options.loc_lambda, w_loc=w_loc)
        return torch.where(w_loc > 0, weights, torch.ones_like(weights))

    def mean_weight(self, loc_sum: Tensor, loc_balanced_sum: Tensor) -> Tensor:
        """The box loss divided by the plain one, on the positives of these sums."""
        return torch.where(self.w_loc > 0, self.w_loc * loc_balanced_sum / loc_sum, 1.0)

    def training_state(self) -> dict[str, Any]:
        """The buffers and the options that they are of, for a checkpoint."""
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        return buffers | {name: getattr(self.options, name) for name in _MEASURED_WITH}

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        A value set by the user stays as set; one measured with other options is measured anew.
        """
        now = {name: getattr(self.options, name) for name in _MEASURED_WITH}
        if self._fixed or any(state.get(name, value) != value for name, value in now.items()):
            return
        for name, buffer in self.named_buffers():
            buffer.copy_(state[name])
        self._num_updates = int(self.sums[0])
        kept = self.options.loc_weight_rule != "running"
        self._settled = kept and self._num_updates >= self.options.loc_weight_steps
