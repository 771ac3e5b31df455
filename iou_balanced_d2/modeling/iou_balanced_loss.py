"""The IoU-balanced losses of a dense detector, from its predictions to two scalars.

Letters: N images, R anchors of one image over all levels, R_l on level l, K classes, P positives,
L levels. Boxes are XYXY in absolute coordinates.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.logger import log_first_n
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor, nn

from ..losses import LossOptions, iou_balanced_cls_weights
from ..losses.focal import OwnTerms, focal_loss
from ..losses.options import BOX_REG_LOSS_TYPES, check_choice
from ..losses.soft_targets import SOFT_TARGET_LOSSES
from ..losses.weights import check_not_negative, plain_and_balanced_sums
from .positives import Positives, find_positives, gather_anchors, gather_gt_boxes, gather_rows
from .w_loc import WLocMeasurement

_BOX_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}

# A scalar makes the host wait for the device, so they are written as often as detectron2 prints.
_LOG_PERIOD = 20
_LEAST_SIDE = 0.01  # pixels, of a box in CIoU
_EMA_MOMENTUM = 0.9  # detectron2's
_NOT_SAVED = (
    "Checkpoints of this training don't hold the losses' state (w_loc, the average number of "
    "positives): let the trainer extend iou_balanced_d2.engine.TrainerMixin, see docs/config.md, "
    "In other trainers"
)

# From the positives, their anchors (P, 4) and ground truth (P, 4) to sums of other losses, by name.
ExtraLosses = Callable[[Positives, Tensor, Tensor], dict[str, Tensor]]


class _Sums(NamedTuple):
    """Sums over the positives of a step, averaged over processes (float64 scalars)."""

    num_pos: Tensor
    cls: Tensor  # sum of CE
    cls_balanced: Tensor  # sum of iou^eta * CE
    loc: Tensor  # sum of the plain localization loss
    loc_balanced: Tensor  # sum of iou^lambda * localization loss
    iou: Tensor
    measured: Tensor  # what w_loc is measured with: loc, or that at the anchors
    measured_balanced: Tensor  # likewise of loc_balanced


class IoUBalancedLoss(nn.Module):
    """Positives -> IoU -> weights -> losses -> their divisor, for any dense detector.

    Its buffers (``num_pos_ema``, those of ``w_loc_measurement``) are *training* state: not part of
    the model's ``state_dict``, which stays the plain detector's. They are saved and resumed through
    :meth:`training_state` and :meth:`load_training_state`.
    """

    num_pos_ema: Tensor
    num_background_scores = 0  #: columns of the logits beside those of the K classes

    def __init__(
        self,
        *,
        num_classes: int,
        box2box_transform: Any,
        options: LossOptions | None = None,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        box_reg_loss_type: str = "smooth_l1",
        num_pos_start: float = 100.0,
    ):
        """Set the hyper-parameters.

        Args:
            num_classes: number of classes, K.
            box2box_transform: detectron2's transform between deltas and boxes
                (``get_deltas``, ``apply_deltas``).
            options: the keys of ``MODEL.IOU_BALANCED``; None takes their defaults.
            focal_loss_alpha: weight of the positives in the focal loss; below 0 positives and
                negatives weigh the same.
            focal_loss_gamma: focusing power of the focal loss.
            smooth_l1_beta: knee of smooth L1; the paper's delta.
            box_reg_loss_type: "smooth_l1" on deltas (the paper's), or "giou", "diou", "ciou" on
                boxes.
            num_pos_start: where the moving average of the number of positives starts: 100 in
                detectron2's RetinaNet, 300 in its FCOS.

        Raises:
            ValueError: if a value is out of its range; the message names the key.
        """
        super().__init__()
        if not focal_loss_alpha <= 1:
            raise ValueError(
                "FOCAL_LOSS_ALPHA must be at most 1 (below 0: positives and negatives weigh the "
                f"same), got {focal_loss_alpha}"
            )
        check_not_negative("FOCAL_LOSS_GAMMA", focal_loss_gamma)
        check_not_negative("SMOOTH_L1_LOSS_BETA", smooth_l1_beta)
        check_choice("BBOX_REG_LOSS_TYPE", box_reg_loss_type, BOX_REG_LOSS_TYPES)
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.options = options or LossOptions()
        if self.options.cls_loss == "iou_balanced":
            self.cls_loss = focal_loss(focal_loss_alpha, focal_loss_gamma)
            self.cls_eta = self.options.cls_eta
        else:  # a rival has the IoU in its targets, and weights of 1
            self.cls_loss, self.cls_eta = SOFT_TARGET_LOSSES[self.options.cls_loss], 0.0
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type
        self.w_loc_measurement = WLocMeasurement(self.options)
        # If set, it is called at each step with the positives' IoU and weights, (P,) each by name.
        self.observer: Callable[[dict[str, Tensor]], None] | None = None
        # Whether checkpoints have the training state: set by what saves it.
        self.is_saved = False
        self.register_buffer("num_pos_ema", torch.tensor(num_pos_start).double(), persistent=False)

    def extra_repr(self) -> str:
        """Show the hyper-parameters where detectron2 logs the model."""
        return repr(self.options)

    @torch.jit.unused
    def forward(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        extra_losses: ExtraLosses | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses; the arguments are those of detectron2's ``losses()``.

        A call with gradients switched on is a training step: it updates the training state.

        Args:
            anchors: L Boxes of R_l anchors.
            pred_logits: L tensors (N, R_l, K), any float precision.
            gt_labels: N tensors (R,) int64, class index; K is background, -1 ignored.
            pred_anchor_deltas: L tensors (N, R_l, 4).
            gt_boxes: N tensors (R, 4), the box matched to each anchor; read at positives only.
            extra_losses: further losses of the same positives, to be divided by the same number;
                it gets the positives, their anchors and their ground truth, both (P, 4).

        Returns:
            "loss_cls" and "loss_box_reg", float32 scalars, and the extra losses.

        Raises:
            ValueError: if a label is above K, or the logits are not of K classes.
        """
        self._check_columns(pred_logits)
        level_sizes = [len(level) for level in anchors]
        positives = find_positives(gt_labels, level_sizes, self.num_classes)
        flat_logits = [x.flatten(0, 1) for x in pred_logits]
        anchor = gather_anchors([level.tensor for level in anchors], positives)
        gt = gather_gt_boxes(gt_boxes, level_sizes, positives)
        # float32 also under autocast, where the deltas come in half precision.
        deltas = gather_rows(pred_anchor_deltas, positives).float()
        iou = self._regressed_iou(deltas, anchor, gt)
        loc_loss = self._loc_loss(deltas, anchor, gt)
        own = self._own_terms(flat_logits, positives, iou)
        sums = self._sums(iou, own.loss, loc_loss.detach())
        if torch.is_grad_enabled():
            sums = self._update_state(sums, anchor, gt)
            self._log(sums, num_images=len(gt_labels), num_pos=positives.num)

        cls_weights = iou_balanced_cls_weights(
            iou, own.loss, eta=self.cls_eta, **self._scope(positives, sums)
        )
        loc_weights = self.w_loc_measurement.weights(iou)
        if self.observer is not None:
            self.observer({"pos_iou": iou, "cls_weight": cls_weights, "loc_weight": loc_weights})
        loss_cls = self._cls_loss(flat_logits, positives, own.times(cls_weights))
        losses = {
            "loss_cls": self.options.cls_loss_weight * loss_cls,
            "loss_box_reg": self.options.bbox_reg_loss_weight * (loc_loss * loc_weights).sum(),
            **(extra_losses(positives, anchor, gt) if extra_losses else {}),
        }
        # A copy: the backward pass needs it after a next forward pass has updated the average.
        divisor = self._divisor(sums).to(loss_cls.dtype, copy=True)
        return {name: loss / divisor for name, loss in losses.items()}

    def _check_columns(self, pred_logits: list[Tensor]) -> None:
        expected = self.num_classes + self.num_background_scores
        columns = [x.shape[-1] for x in pred_logits]
        if set(columns) - {expected}:
            raise ValueError(f"expected logits of {expected} columns, got {columns}")

    def _scope(self, positives: Positives, sums: _Sums) -> dict[str, Any]:
        """CLS_NORM_SCOPE as arguments of :func:`iou_balanced_cls_weights`."""
        scope = self.options.cls_norm_scope
        if scope == "global":
            return {"sums": (sums.cls, sums.cls_balanced)}
        if scope not in ("level", "image"):
            return {}
        num_groups = len(positives.blocks if scope == "level" else positives.blocks[0])
        return {"group": getattr(positives, scope), "num_groups": num_groups}

    def _own_terms(self, flat_logits: list[Tensor], positives: Positives, iou: Tensor) -> OwnTerms:
        """The positives' terms of the classification loss; their loss is CE_i of eq. 2."""
        return self.cls_loss.own_terms(flat_logits, positives.targets, iou)

    def _cls_loss(self, flat_logits: list[Tensor], positives: Positives, own: OwnTerms) -> Tensor:
        """Eq. 1, the positives' own terms weighted."""
        return self.cls_loss.sum(flat_logits, positives.targets, own)

    @torch.no_grad()
    def _regressed_iou(self, deltas: Tensor, anchor: Tensor, gt: Tensor) -> Tensor:
        """IoU (P,) of the decoded boxes with their ground truth; 0 where it is not a number.

        Boxes of no area and diverged deltas give 0/0 or inf/inf. The classification loss then uses
        IoU 0; the box loss itself stays NaN and is reported by its name.
        """
        boxes = self.box2box_transform.apply_deltas(deltas, anchor)
        iou = matched_pairwise_iou(Boxes(boxes), Boxes(gt))
        return iou.nan_to_num(nan=0.0).clamp(0.0, 1.0)

    def _loc_loss(self, deltas: Tensor, anchor: Tensor, gt: Tensor) -> Tensor:
        """Plain localization loss (P,) of each positive, summed over its coordinates."""
        if self.box_reg_loss_type == "smooth_l1":
            target = self.box2box_transform.get_deltas(anchor, gt)
            loss = smooth_l1_loss(deltas, target, beta=self.smooth_l1_beta, reduction="none")
            return loss.sum(dim=1)
        # Diverged deltas give a NaN loss, reported by its name, instead of an assertion on boxes.
        finite = torch.isfinite(deltas).all(dim=1)
        boxes = self.box2box_transform.apply_deltas(deltas.where(finite[:, None], 0.0), anchor)
        if self.box_reg_loss_type == "ciou":  # the gradient of its atan(w / h) is NaN at 0
            low, high = boxes.split(2, dim=1)
            least = (1e-6 * low.detach().abs()).clamp(min=_LEAST_SIDE)
            boxes = torch.cat([low, high.maximum(low + least)], dim=1)
        loss = _BOX_LOSSES[self.box_reg_loss_type](boxes, gt, reduction="none")
        return loss.where(finite, float("nan"))

    @torch.no_grad()
    def _sums(self, iou: Tensor, cls_loss: Tensor, loc_loss: Tensor) -> _Sums:
        iou, cls_loss, loc_loss = iou.double(), cls_loss.double(), loc_loss.double()
        cls = plain_and_balanced_sums(iou, cls_loss, power=self.cls_eta)
        loc = plain_and_balanced_sums(iou, loc_loss, power=self.options.loc_lambda)
        return _Sums(torch.ones_like(iou).sum(), *cls, *loc, iou.sum(), *loc)

    @torch.no_grad()
    def sums_at_anchors(self, anchor: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        """The box loss, plain and times IoU^lambda, if all predicted deltas were 0.

        The rule "anchors" measures w_loc with them: it is the first divided by the second.

        Args:
            anchor: (P, 4) float, XYXY, of the positives.
            gt: (P, 4), the ground truth of each.

        Returns:
            two float64 scalars, sums over the positives.
        """
        deltas = torch.zeros_like(anchor)
        iou = self._regressed_iou(deltas, anchor, gt).double()
        loc_loss = self._loc_loss(deltas, anchor, gt).double()
        return plain_and_balanced_sums(iou, loc_loss, power=self.options.loc_lambda)

    def _divisor(self, sums: _Sums) -> Tensor:
        return self.num_pos_ema if self.options.normalizer == "ema" else sums.num_pos.clamp(min=1)

    @torch.no_grad()
    def _update_state(self, sums: _Sums, anchor: Tensor, gt: Tensor) -> _Sums:
        """Update the average of positives and w_loc with the mean of all processes' sums.

        Returns that mean, which is the same on every process; anchor and gt are (P, 4).
        """
        if self.w_loc_measurement.measures_anchors():
            measured, balanced = self.sums_at_anchors(anchor, gt)
            sums = sums._replace(measured=measured, measured_balanced=balanced)
        sums = _mean_over_processes(sums)
        new = sums.num_pos.clamp(min=1) * (1 - _EMA_MOMENTUM)
        self.num_pos_ema.mul_(_EMA_MOMENTUM).add_(new)
        self.w_loc_measurement.update(sums.measured, sums.measured_balanced)
        return sums

    def _log(self, sums: _Sums, *, num_images: int, num_pos: int) -> None:
        """Write the scalars named after the keys, as often as detectron2's writers print."""
        storage = _event_storage()
        if storage is None:
            return
        storage.put_scalar("num_pos_anchors", num_pos / max(num_images, 1))
        if (storage.iter + 1) % _LOG_PERIOD:
            return
        if not self.is_saved:  # a training, rather than a few steps that are measured
            log_first_n(logging.WARNING, _NOT_SAVED, name=__name__)
        if num_pos > 0:
            scalars = {
                "mean_pos_iou": sums.iou / sums.num_pos,
                "cls_scale": torch.where(sums.cls_balanced > 0, sums.cls / sums.cls_balanced, 1.0),
                "w_loc": self.w_loc_measurement.w_loc,
                "loc_mean_weight": self.w_loc_measurement.mean_weight(sums.loc, sums.loc_balanced),
            }
            for name, value in scalars.items():
                storage.put_scalar(f"iou_balanced/{name}", value)

    def training_state(self) -> dict[str, Any]:
        """The average number of positives and w_loc's measurement, for a checkpoint."""
        return {
            "num_pos_ema": self.num_pos_ema.clone(),
            "w_loc_measurement": self.w_loc_measurement.training_state(),
            "box_reg_loss_type": self.box_reg_loss_type,
        }

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; w_loc stays if the user set it.

        A w_loc that was measured with another type of box loss, lambda, rule or number of steps is
        measured anew.
        """
        self.num_pos_ema.copy_(state["num_pos_ema"])
        if state.get("box_reg_loss_type", self.box_reg_loss_type) == self.box_reg_loss_type:
            self.w_loc_measurement.load_training_state(state["w_loc_measurement"])


def _event_storage() -> EventStorage | None:
    """detectron2's storage of scalars, None outside of a training loop."""
    try:
        return get_event_storage()
    except AssertionError:  # detectron2 0.6 has no other way to ask
        return None


def _mean_over_processes(sums: _Sums) -> _Sums:
    """Average the sums over all processes: one collective a step, also without positives."""
    world_size = comm.get_world_size()
    if world_size == 1:
        return sums
    packed = torch.stack(sums)
    torch.distributed.all_reduce(packed)
    return _Sums(*(packed / world_size).unbind())
