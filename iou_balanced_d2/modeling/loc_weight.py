"""w_loc of eq. 4: set by the user, or measured from the training itself."""

import logging

import torch
from torch import Tensor, nn

from ..losses import iou_balanced_loc_weights

LOC_WEIGHT_RULES = ("first", "anchors", "warmup", "running")

# Below this share of the plain loss the boxes hardly overlap their ground truth yet (FCOS starts
# at IoU 0), and a w_loc measured there would be over 10 and blow up the loss of later steps.
_MIN_BALANCED_SHARE = 0.1
# Heads that start at noise (with normalisation layers) gave 5.5 and more, and a worse detector.
_LARGE_W_LOC = 5.0
# Why it may be so large, and what to do.
_BAD_ANCHORS = (
    "the anchors overlap the objects little (tools/check_dataset.py tells how many they meet)",
    "anchors that fit the objects",
)
_BAD_BOXES = (
    "the first boxes are bad",
    "LOC_WEIGHT_RULE anchors (running, for a detector without anchors)",
)

logger = logging.getLogger(__name__)


class LocWeight(nn.Module):
    """The constant w_loc, which makes up for IoU^lambda <= 1 in the box loss.

    Its buffers are training state, not weights: see :class:`IoUBalancedLoss`.
    """

    w_loc: Tensor
    loc_sum: Tensor
    loc_balanced_sum: Tensor
    steps: Tensor

    def __init__(self, *, loc_weight: float, loc_weight_rule: str, warmup_iters: int):
        """Start with the user's value, or with none.

        Args:
            loc_weight: w_loc if not 0.
            loc_weight_rule: how to measure it otherwise. Each rule is
                sum(loss) / sum(iou^lambda * loss) over the positives of

                * "first": the first step that has boxes to measure, then kept (the paper's);
                * "anchors": the same, with the anchors themselves taken for the boxes;
                * "warmup": all steps of the learning rate's warm-up, then kept;
                * "running": every step anew, eq. 5.
            warmup_iters: number of steps of the warm-up, for "warmup".
        """
        super().__init__()
        self.loc_weight = loc_weight
        self.loc_weight_rule = loc_weight_rule
        # Steps that the measurement takes.
        self._num_steps = max(warmup_iters, 1) if loc_weight_rule == "warmup" else 1
        self._num_updates = 0
        # 0 stands for "not measured yet".
        for name, value in (
            ("w_loc", loc_weight), ("loc_sum", 0.0), ("loc_balanced_sum", 0.0), ("steps", 0.0)
        ):  # fmt: skip
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=False)
        # Whether w_loc is settled, and nothing is left to measure.
        self._settled = loc_weight > 0

    @property
    def measures_anchors(self) -> bool:
        """Whether the next step's sums are to be taken at the anchors instead of the boxes."""
        return self.loc_weight_rule == "anchors" and not self._settled

    @torch.no_grad()
    def update(self, loc_sum: Tensor, loc_balanced_sum: Tensor) -> None:
        """Take in one training step.

        Args:
            loc_sum: float64 scalar, plain box loss summed over the positives of all processes
                (or its mean over processes).
            loc_balanced_sum: the same of iou^lambda * loss.
        """
        if self._settled:
            return
        # NaN sums (diverged deltas) and sums of 0 (no positives) compare as "can't measure".
        usable = (loc_balanced_sum > 0) & torch.isfinite(loc_sum)
        if self.loc_weight_rule == "running":
            w_loc = loc_sum / loc_balanced_sum
            usable &= torch.isfinite(w_loc.float())  # the weights' type: inf * 0 would be NaN
            self.w_loc.copy_(torch.where(usable, w_loc, 0.0))
            return
        usable &= loc_balanced_sum >= _MIN_BALANCED_SHARE * loc_sum
        usable &= self.steps < self._num_steps
        self.steps += usable
        self.loc_sum += torch.where(usable, loc_sum, 0.0)
        self.loc_balanced_sum += torch.where(usable, loc_balanced_sum, 0.0)
        self.w_loc.copy_((self.loc_sum / self.loc_balanced_sum).nan_to_num(nan=0.0))
        self._tell()

    def _tell(self) -> None:
        """Log the value once it is settled; the host waits for the device until then only."""
        self._num_updates += 1
        if self._num_updates < self._num_steps or self.steps < self._num_steps:
            return
        self._settled = True
        logger.info(f"w_loc measured: {float(self.w_loc):.4f} (kept from now on)")
        if self.w_loc > _LARGE_W_LOC:
            cause, remedy = _BAD_ANCHORS if self.loc_weight_rule == "anchors" else _BAD_BOXES
            logger.warning(
                f"This w_loc is far above the paper's 2.3 to 3.0, as {cause}. Once boxes are good "
                "the box loss will weigh several times the plain one "
                "(iou_balanced/loc_mean_weight). Consider MODEL.IOU_BALANCED.LOC_WEIGHT 2.0, or "
                f"{remedy}"
            )

    def weights(self, iou: Tensor, lambda_: float) -> Tensor:
        """Eq. 4, (P,) without gradient; 1 for all positives while w_loc is not known yet."""
        w_loc = self.w_loc.to(iou.dtype)
        weights = iou_balanced_loc_weights(iou, lambda_=lambda_, w_loc=w_loc)
        return torch.where(w_loc > 0, weights, torch.ones_like(weights))

    def mean_weight(self, loc_sum: Tensor, loc_balanced_sum: Tensor) -> Tensor:
        """What the box loss weighs against the plain one on the positives of these sums."""
        return torch.where(self.w_loc > 0, self.w_loc * loc_balanced_sum / loc_sum, 1.0)

    def training_state(self) -> dict[str, Tensor]:
        """The buffers, for a checkpoint."""
        return {name: buffer.clone() for name, buffer in self.named_buffers()}

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take up the state of a checkpoint; a value set by the user stays as set."""
        if self.loc_weight > 0:
            return
        for name, buffer in self.named_buffers():
            buffer.copy_(state[name])
        self._num_updates = int(self.steps)
        self._settled = self._num_updates >= self._num_steps
