"""The IoU-balanced losses of a dense detector, from its predictions to two scalars.

Letters: N images, R anchors of one image over all levels, R_l on level l, K classes, P positives,
L levels. Boxes are XYXY in absolute coordinates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor, nn

from ..losses.focal import positive_focal_loss, weighted_focal_sum
from ..losses.weights import (
    apply_cls_scale,
    check_power,
    iou_balanced_cls_weights,
    sum_keeping_scale,
)
from .loc_weight import LOC_WEIGHT_RULES, LocWeight
from .positives import Positives, find_positives, gather_anchors, gather_gt_boxes, gather_rows

CLS_NORM_SCOPES = ("batch", "level", "image", "global")
NORMALIZERS = ("ema", "batch")
BOX_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}

# Scalars cost a host sync: written as often as detectron2's writers print.
_LOG_PERIOD = 20
_EMA_MOMENTUM = 0.9  # detectron2's


class _Sums(NamedTuple):
    """What one step sums over its positives, averaged over processes (float64 scalars)."""

    num_pos: Tensor
    cls: Tensor  # sum of CE
    cls_balanced: Tensor  # sum of iou^eta * CE
    loc: Tensor  # sum of the plain localization loss
    loc_balanced: Tensor  # sum of iou^lambda * localization loss
    iou: Tensor


class LossSums(NamedTuple):
    """The losses of one step before they are divided, and what they were computed of.

    Attributes:
        cls: float32 scalar, the classification loss summed over all logits (eq. 1).
        loc: float32 scalar, the localization loss summed over the positives (eq. 3).
        normalizer: float32 scalar, what the losses are to be divided by; no gradient.
        positives: the P positives.
        anchor: (P, 4), their anchors.
        gt: (P, 4), their ground truth.
    """

    cls: Tensor
    loc: Tensor
    normalizer: Tensor
    positives: Positives
    anchor: Tensor
    gt: Tensor


class IoUBalancedLoss(nn.Module):
    """Positives -> IoU -> weights -> losses -> normaliser, for any dense detector.

    Its buffers (the measured w_loc, ``loss_normalizer``) are *training* state: not part of the
    model's ``state_dict``, which stays the plain detector's. They are saved and resumed through
    :meth:`training_state` and :meth:`load_training_state`.
    """

    loss_normalizer: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        box2box_transform: Any,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        box_reg_loss_type: str = "smooth_l1",
        cls_eta: float = 1.5,
        cls_norm_scope: str = "batch",
        loc_lambda: float = 1.5,
        loc_weight: float = 0.0,
        loc_weight_rule: str = "anchors",
        warmup_iters: int = 1000,
        normalizer: str = "ema",
        normalizer_start: float = 100.0,
    ):
        """Set the hyper-parameters; their names are the config's keys in lower case.

        Args:
            num_classes: number of classes, K.
            box2box_transform: detectron2's transform between deltas and boxes
                (``get_deltas``, ``apply_deltas``).
            focal_loss_alpha: weight of the positives in the focal loss.
            focal_loss_gamma: focusing power of the focal loss.
            smooth_l1_beta: knee of smooth L1; the paper's delta.
            box_reg_loss_type: "smooth_l1" on deltas (the paper's), or "giou", "diou", "ciou" on
                boxes.
            cls_eta: eta of eq. 2; 0 is the plain focal loss.
            cls_norm_scope: within what eq. 2 keeps the sum: "batch" (this process's), "level",
                "image", or "global" (over all processes).
            loc_lambda: lambda of eq. 4; 0 is the plain box loss.
            loc_weight: w_loc of eq. 4; 0 measures it by ``loc_weight_rule``.
            loc_weight_rule: "first", "anchors", "warmup" or "running", see :class:`LocWeight`.
            warmup_iters: steps of the learning rate's warm-up, for the rule "warmup".
            normalizer: "ema", detectron2's moving average of the number of positives, or "batch",
                that of this step.
            normalizer_start: where the moving average starts: 100 in detectron2's RetinaNet, 300
                in its FCOS.

        Raises:
            ValueError: if a value is out of its range; the message names the argument.
        """
        super().__init__()
        for name, value in (
            ("cls_eta", cls_eta),
            ("loc_lambda", loc_lambda),
            ("loc_weight", loc_weight),
        ):
            check_power(name, value)
        _check_choice("cls_norm_scope", cls_norm_scope, CLS_NORM_SCOPES)
        _check_choice("loc_weight_rule", loc_weight_rule, LOC_WEIGHT_RULES)
        _check_choice("normalizer", normalizer, NORMALIZERS)
        _check_choice("box_reg_loss_type", box_reg_loss_type, ("smooth_l1", *BOX_LOSSES))
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type
        self.cls_eta = cls_eta
        self.cls_norm_scope = cls_norm_scope
        self.loc_lambda = loc_lambda
        self.normalizer = normalizer
        self.loc_weight = LocWeight(
            # With lambda 0 there is nothing to make up for, nor to measure.
            loc_weight=loc_weight or float(loc_lambda == 0),
            loc_weight_rule=loc_weight_rule,
            warmup_iters=warmup_iters,
        )
        # Where set, called at each step with the positives' IoU and weights, (P,) each by name.
        self.observer: Callable[[dict[str, Tensor]], None] | None = None
        self.register_buffer("loss_normalizer", torch.tensor(normalizer_start).double(), False)

    def extra_repr(self) -> str:
        """Show the hyper-parameters where detectron2 logs the model."""
        names = ("cls_eta", "cls_norm_scope", "loc_lambda", "normalizer")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @torch.jit.unused
    def forward(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the two losses; the arguments are those of detectron2's ``losses()``.

        Args:
            anchors: L Boxes of R_l anchors.
            pred_logits: L tensors (N, R_l, K), any float precision.
            gt_labels: N tensors (R,) int64, class index; K is background, -1 ignored.
            pred_anchor_deltas: L tensors (N, R_l, 4).
            gt_boxes: N tensors (R, 4), the box matched to each anchor; read at positives only.

        Returns:
            "loss_cls" and "loss_box_reg", float32 scalars divided by the normaliser.
        """
        sums = self.loss_sums(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        return {
            "loss_cls": sums.cls / sums.normalizer,
            "loss_box_reg": sums.loc / sums.normalizer,
        }

    def loss_sums(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> LossSums:
        """What :meth:`forward` divides, for detectors that have a third loss or other names.

        Args:
            anchors: as in :meth:`forward`, and so the next four.
            pred_logits: L tensors (N, R_l, K).
            gt_labels: N tensors (R,).
            pred_anchor_deltas: L tensors (N, R_l, 4).
            gt_boxes: N tensors (R, 4).

        Returns:
            the sums and their divisor. As :meth:`forward` this moves the training state on.
        """
        level_sizes = [len(level) for level in anchors]
        positives = find_positives(gt_labels, level_sizes, self.num_classes)
        flat_logits = [x.flatten(0, 1) for x in pred_logits]

        anchor = gather_anchors([level.tensor for level in anchors], positives)
        gt = gather_gt_boxes(gt_boxes, level_sizes, positives)
        # float32 also under autocast, where the deltas come in half precision.
        deltas = gather_rows(pred_anchor_deltas, positives).float()
        iou = self._regressed_iou(deltas, anchor, gt)
        loc_loss = self._loc_loss(deltas, anchor, gt)
        cls_loss = self._positive_cls_loss(flat_logits, positives)

        sums = self._sums(iou, cls_loss, loc_loss.detach())
        if torch.is_grad_enabled():
            sums = _mean_over_processes(self._measured_at_anchors(sums, anchor, gt))
            self._update_state(sums)
            self._log(sums, num_images=len(gt_labels), num_pos=positives.num)

        cls_weights = self._cls_weights(iou, cls_loss, positives, sums)
        loss_cls = self._cls_loss(flat_logits, positives, cls_weights)
        loc_weights = self.loc_weight.weights(iou, self.loc_lambda)
        loss_box_reg = (loc_loss * loc_weights).sum()
        if self.observer is not None:
            self.observer({"pos_iou": iou, "cls_weight": cls_weights, "loc_weight": loc_weights})
        normalizer = self._normalizer(sums).to(loss_cls.dtype)
        return LossSums(loss_cls, loss_box_reg, normalizer, positives, anchor, gt)

    @torch.no_grad()
    def _regressed_iou(self, deltas: Tensor, anchor: Tensor, gt: Tensor) -> Tensor:
        """IoU (P,) of the decoded boxes with their ground truth; 0 where it is not a number.

        Boxes of no area and diverged deltas give 0/0 or inf/inf. The classification loss then
        goes on with IoU 0; the box loss itself stays NaN and is reported by its name.
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
        # Diverged deltas: a NaN loss, reported by its name, instead of an assertion on boxes.
        finite = torch.isfinite(deltas).all(dim=1)
        boxes = self.box2box_transform.apply_deltas(deltas.where(finite[:, None], 0.0), anchor)
        loss = BOX_LOSSES[self.box_reg_loss_type](boxes, gt, reduction="none")
        return loss.where(finite, float("nan"))

    def _positive_cls_loss(self, flat_logits: list[Tensor], positives: Positives) -> Tensor:
        """CE_i of eq. 2 for the P positives, without gradient."""
        hyper = {"alpha": self.focal_loss_alpha, "gamma": self.focal_loss_gamma}
        terms = [
            positive_focal_loss(logits, targets, **hyper)
            for logits, targets in zip(flat_logits, positives.targets, strict=True)
        ]
        return torch.cat(terms)

    def _cls_loss(self, flat_logits: list[Tensor], positives: Positives, weights: Tensor) -> Tensor:
        """Eq. 1: the focal loss summed over all levels, the positives weighted."""
        hyper = {"alpha": self.focal_loss_alpha, "gamma": self.focal_loss_gamma}
        losses = [
            weighted_focal_sum(logits, targets, level_weights, **hyper)
            for logits, targets, level_weights in zip(
                flat_logits, positives.targets, weights.split(positives.per_level), strict=True
            )
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _sums(self, iou: Tensor, cls_loss: Tensor, loc_loss: Tensor) -> _Sums:
        columns = (
            torch.ones_like(iou),
            cls_loss,
            iou**self.cls_eta * cls_loss,
            loc_loss,
            iou**self.loc_lambda * loc_loss,
            iou,
        )
        return _Sums(*torch.stack(columns).double().sum(dim=1).unbind())

    @torch.no_grad()
    def _measured_at_anchors(self, sums: _Sums, anchor: Tensor, gt: Tensor) -> _Sums:
        """For the rule "anchors": the box loss's sums of predictions that are all 0."""
        if not self.loc_weight.measures_anchors:
            return sums
        deltas = torch.zeros_like(anchor)
        iou = self._regressed_iou(deltas, anchor, gt)
        loc_loss = self._loc_loss(deltas, anchor, gt)
        at_anchors = self._sums(iou, loc_loss, loc_loss)
        return sums._replace(loc=at_anchors.loc, loc_balanced=at_anchors.loc_balanced)

    @torch.no_grad()
    def _update_state(self, sums: _Sums) -> None:
        """Move the normaliser's average and w_loc on; the sums are the same on every process."""
        new = sums.num_pos.clamp(min=1) * (1 - _EMA_MOMENTUM)
        self.loss_normalizer.mul_(_EMA_MOMENTUM).add_(new)
        self.loc_weight.update(sums.loc, sums.loc_balanced)

    def _cls_weights(
        self, iou: Tensor, cls_loss: Tensor, positives: Positives, sums: _Sums
    ) -> Tensor:
        """Eq. 2 within the scope asked for, (P,)."""
        if self.cls_norm_scope == "global":
            # In the weights' own type: a scale beyond it would be infinite, and inf * 0 NaN.
            scale = sum_keeping_scale(sums.cls_balanced.to(iou.dtype), sums.cls.to(iou.dtype))
            return apply_cls_scale(iou**self.cls_eta, scale)
        group = {"batch": None, "level": positives.level, "image": positives.image}
        return iou_balanced_cls_weights(
            iou, cls_loss, eta=self.cls_eta, group=group[self.cls_norm_scope]
        )

    def _normalizer(self, sums: _Sums) -> Tensor:
        return self.loss_normalizer if self.normalizer == "ema" else sums.num_pos.clamp(min=1)

    def _log(self, sums: _Sums, *, num_images: int, num_pos: int) -> None:
        """Write the scalars named after the keys, as often as detectron2's writers print."""
        storage = _event_storage()
        if storage is None:
            return
        storage.put_scalar("num_pos_anchors", num_pos / max(num_images, 1))
        if (storage.iter + 1) % _LOG_PERIOD == 0 and num_pos > 0:
            mean_weight = self.loc_weight.mean_weight(sums.loc, sums.loc_balanced)
            scalars = {
                "mean_pos_iou": sums.iou / sums.num_pos,
                "cls_scale": sums.cls / sums.cls_balanced,
                "w_loc": self.loc_weight.w_loc,
                "loc_mean_weight": mean_weight,
            }
            for name, value in scalars.items():
                storage.put_scalar(f"iou_balanced/{name}", value)

    def training_state(self) -> dict[str, Any]:
        """The measured w_loc and the normaliser's average, for a checkpoint."""
        return {
            "loss_normalizer": self.loss_normalizer.clone(),
            "loc_weight": self.loc_weight.training_state(),
        }

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; a w_loc set by the user (not 0) stays as set."""
        self.loss_normalizer.copy_(state["loss_normalizer"])
        self.loc_weight.load_training_state(state["loc_weight"])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _event_storage() -> EventStorage | None:
    """detectron2's storage of scalars, None outside of a training loop."""
    try:
        return get_event_storage()
    except AssertionError:  # detectron2 0.6 has no other way to ask
        return None


def _mean_over_processes(sums: _Sums) -> _Sums:
    """Average the sums over all processes: one collective a step, whatever each of them found."""
    world_size = comm.get_world_size()
    if world_size == 1:
        return sums
    packed = torch.stack(sums)
    torch.distributed.all_reduce(packed)
    return _Sums(*(packed / world_size).unbind())
