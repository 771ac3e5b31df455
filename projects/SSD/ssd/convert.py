"""torchvision's weights in this project's names: SSD300-VGG16, and VGG16 for the backbone.

Checkpoints of torchvision are recognised when they are loaded (MODEL.WEIGHTS).
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .vgg import STAGES

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


def _vgg_convolutions() -> dict[str, str]:
    """Name of each convolution of VGG16 -> index of torchvision's ``features``."""
    names, index = {}, 0
    for stage, (_, num_convs) in enumerate(STAGES, start=1):
        for i in range(1, num_convs + 1):
            names[f"conv{stage}_{i}"] = index
            index += 2  # and a ReLU
        index += 1  # the pool
    return {name: str(i) for name, i in names.items()}


def convert_vgg16(state: Mapping[str, Tensor]) -> StateDict:
    """Convert torchvision's ``vgg16`` state dict to that of :class:`SSDBackbone`'s VGG16.

    fc6 and fc7 are made of the classifier's first two layers as in the SSD paper: every 4th
    output, and of fc6's 7x7 places each third. A file without usable classifier (the features
    alone, or NaN) leaves them out.

    Args:
        state: "features.<i>.weight", and so on.

    Returns:
        "backbone.bottom_up.conv1_1.weight", and so on.
    """
    converted = {
        f"backbone.bottom_up.{name}.{kind}": state[f"features.{index}.{kind}"]
        for name, index in _vgg_convolutions().items()
        for kind in ("weight", "bias")
    }
    fc6 = state.get("classifier.0.weight")
    if fc6 is None or not torch.isfinite(fc6).all():
        return converted
    fc7 = state["classifier.3.weight"]
    converted["backbone.bottom_up.fc6.weight"] = fc6.view(4096, 512, 7, 7)[::4, :, ::3, ::3]
    converted["backbone.bottom_up.fc6.bias"] = state["classifier.0.bias"][::4]
    converted["backbone.bottom_up.fc7.weight"] = fc7[::4, ::4, None, None]
    converted["backbone.bottom_up.fc7.bias"] = state["classifier.3.bias"][::4]
    return converted


def convert_ssd300(state: Mapping[str, Tensor], classes: Sequence[int] | None = None) -> StateDict:
    """Convert the state dict of ``torchvision.models.detection.ssd300_vgg16``.

    Args:
        state: its ``state_dict()``; class 0 is background.
        classes: torchvision's numbers of the K classes to keep, in their new order; None keeps
            all of them.

    Returns:
        the state dict of :class:`SSD` with VGG16 and the extra layers of SSD300.
    """
    names = {"backbone.scale_weight": "backbone.bottom_up.conv4_3_norm.scale"}
    for name, index in _vgg_convolutions().items():
        if name.startswith("conv5"):  # torchvision puts conv5 into its first extra block
            place = f"extra.0.{int(index) - 23}"
        else:
            place = f"features.{index}"
        names |= _both(f"backbone.{place}", f"backbone.bottom_up.{name}")
    names |= _both("backbone.extra.0.7.1", "backbone.bottom_up.fc6")
    names |= _both("backbone.extra.0.7.3", "backbone.bottom_up.fc7")
    for i in range(4):
        names |= _both(f"backbone.extra.{i + 1}.0", f"backbone.extra.{i}.reduce")
        names |= _both(f"backbone.extra.{i + 1}.2", f"backbone.extra.{i}.conv")
    for i in range(6):
        names |= _both(f"head.regression_head.module_list.{i}", f"head.bbox_pred.{i}")
    converted = {new: state[old] for old, new in names.items()}
    for old, new in _head_names():
        num_anchors = len(state[old.replace("classification", "regression")]) // 4
        scores = state[old].unflatten(0, (num_anchors, -1))  # (A, background + classes, ...)
        kept = range(1, scores.shape[1]) if classes is None else classes
        converted[new] = scores[:, [*kept, 0]].flatten(0, 1)
    return converted


def _both(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{kind}": f"{new}.{kind}" for kind in ("weight", "bias")}


def _head_names() -> list[tuple[str, str]]:
    return [
        (f"head.classification_head.module_list.{i}.{kind}", f"head.cls_score.{i}.{kind}")
        for i in range(6)
        for kind in ("weight", "bias")
    ]


def convert_torchvision(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Convert a checkpoint of torchvision for a detector; leave any other as it is.

    Scores of other classes than the detector's are left out, and logged.

    Args:
        state: a state dict.
        model: an :class:`SSD`.

    Returns:
        a state dict of the detector.
    """
    if "features.0.weight" in state:
        converted = convert_vgg16(state)
    elif "head.classification_head.module_list.0.weight" in state:
        converted = convert_ssd300(state)
    else:
        return state
    own = {name: value.shape for name, value in model.state_dict().items()}
    left_out = [k for k, v in converted.items() if own.get(k) != v.shape]
    if left_out:
        logger.warning(f"left out, as the detector has other shapes: {', '.join(left_out)}")
    return {k: v for k, v in converted.items() if k not in left_out}
