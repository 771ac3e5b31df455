"""The options of the losses: names, defaults, meanings and checks, once for all detectors."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from .weights import check_not_negative

CLS_LOSSES = ("iou_balanced", "quality_focal", "varifocal")
CLS_NORM_SCOPES = ("batch", "level", "image", "global")
LOC_WEIGHT_RULES = ("anchors", "first", "running")
NORMALIZERS = ("ema", "batch")
BOX_REG_LOSS_TYPES = ("smooth_l1", "giou", "diou", "ciou")

_CHOICES = {
    "cls_loss": CLS_LOSSES,
    "cls_norm_scope": CLS_NORM_SCOPES,
    "loc_weight_rule": LOC_WEIGHT_RULES,
    "normalizer": NORMALIZERS,
}


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The keys of ``MODEL.IOU_BALANCED``; a field is the key of its name in lower case.

    The comment above a field is its meaning; ``python -m iou_balanced_d2.config`` prints it.

    Raises:
        ValueError: if a value is out of its range; the message names the key.
    """

    # The classification loss: "iou_balanced" = focal loss with the positives weighted by eq. 2;
    # "quality_focal" (arXiv 2006.04388, beta 2) or "varifocal" (arXiv 2008.13367, alpha 0.75,
    # gamma 2) = the IoU of a positive's regressed box is the target of its score. These two ignore
    # FOCAL_LOSS_ALPHA, FOCAL_LOSS_GAMMA, CLS_ETA and CLS_NORM_SCOPE; not for SSD.
    cls_loss: str = "iou_balanced"
    # eta of eq. 2: the positives' classification loss is weighted by IoU^eta and keeps its sum.
    # 0.0 is the plain focal loss.
    cls_eta: float = 1.5
    # The positives over which eq. 2 keeps the sum: "batch" = all of this process, the equation as
    # written; "level" = those of each pyramid level, the author's RetinaNet code; "image" = those
    # of each image, his SSD code; "global" = those of all processes.
    cls_norm_scope: str = "batch"
    # Factor of the whole classification loss.
    cls_loss_weight: float = 1.0
    # lambda of eq. 4: the positives' box loss is weighted by w_loc * IoU^lambda.
    # 0.0 is the plain box loss, times LOC_WEIGHT if that is not 0.0.
    loc_lambda: float = 1.5
    # w_loc of eq. 4. 0.0 = measure it by LOC_WEIGHT_RULE; any other value is used as it is (the
    # author's, tuned by hand: 3.049 for R50 on COCO, 2.34 on VOC).
    loc_weight: float = 0.0
    # The boxes on which w_loc is measured, such that the box loss keeps its sum: "anchors" = the
    # anchors, which a head that starts at 0 predicts (as the paper's does); also for heads that
    # start at noise, but not for FCOS or fine-tuning; "first" = the regressed boxes of the first
    # steps, the paper's rule; "running" = the regressed boxes of each step, eq. 5.
    loc_weight_rule: str = "anchors"
    # The number of first steps with positives over which "anchors" and "first" measure. During
    # these steps w_loc is the value measured so far; then it is kept. The paper has 1.
    loc_weight_steps: int = 50
    # Factor of the whole box loss, beside w_loc.
    bbox_reg_loss_weight: float = 1.0
    # The divisor of the losses: "ema" = the moving average of the number of positives,
    # detectron2's rule; "batch" = the number of positives of this step, the author's code.
    normalizer: str = "ema"

    def __post_init__(self) -> None:
        """Check each value."""
        for field in fields(self):
            key, value = f"MODEL.IOU_BALANCED.{field.name.upper()}", getattr(self, field.name)
            if field.name in _CHOICES:
                check_choice(key, value, _CHOICES[field.name])
            else:
                check_not_negative(key, value)
        if self.loc_weight_steps < 1:
            raise ValueError("MODEL.IOU_BALANCED.LOC_WEIGHT_STEPS must be at least 1, got 0")


def check_choice(key: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError, which names key and choices, unless a value is one of these words."""
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
