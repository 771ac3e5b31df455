"""torchvision's weights in this project's names: SSD300-VGG16, and VGG16 for the backbone.

Checkpoints of torchvision are recognised when they are loaded (MODEL.WEIGHTS).
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor, nn

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
_KINDS = ("weight", "bias")
_SCORES = "head.classification_head.module_list"
# torchvision's numbers of COCO's 80 classes are COCO's ids, of 90 with 10 that are not used.
COCO_CLASSES = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
_NUM_COCO_IDS = 90


def convert_vgg16(state: Mapping[str, Tensor]) -> StateDict:
    """Convert torchvision's ``vgg16`` state dict to that of :class:`SSDBackbone`'s VGG16.

    fc6 and fc7 are made of the classifier's first two layers as in the SSD paper: every 4th output,
    and of fc6's 7x7 places each third. A file without usable classifier (the features alone, or
    NaN) leaves them out.
    """
    prefix = "backbone.bottom_up"
    converted = {f"{prefix}.{k}": v for k, v in state.items() if k.startswith("features.")}
    fc6 = state.get("classifier.0.weight")
    if fc6 is None or not torch.isfinite(fc6).all():
        return converted
    fc7 = state["classifier.3.weight"]
    converted[f"{prefix}.fc6.weight"] = fc6.view(4096, 512, 7, 7)[::4, :, ::3, ::3]
    converted[f"{prefix}.fc6.bias"] = state["classifier.0.bias"][::4]
    converted[f"{prefix}.fc7.weight"] = fc7[::4, ::4, None, None]
    converted[f"{prefix}.fc7.bias"] = state["classifier.3.bias"][::4]
    return converted


def convert_ssd300(state: Mapping[str, Tensor], classes: Sequence[int] | None = None) -> StateDict:
    """Convert ``torchvision.models.detection.ssd300_vgg16``'s state dict to that of :class:`SSD`.

    ``classes`` are torchvision's numbers of those to keep, in their new order; None keeps all.
    """
    # torchvision's first extra block begins with the pool before conv5.
    layers = {f"extra.0.{i}": f"bottom_up.features.{i + 23}" for i in (1, 3, 5)}
    layers |= {"extra.0.7.1": "bottom_up.fc6", "extra.0.7.3": "bottom_up.fc7"}
    for i in range(4):
        layers |= {f"extra.{i + 1}.0": f"extra.{i}.reduce", f"extra.{i + 1}.2": f"extra.{i}.conv"}
    names = {f"backbone.{old}.{k}": f"backbone.{layers[old]}.{k}" for old in layers for k in _KINDS}
    names["backbone.scale_weight"] = "backbone.bottom_up.conv4_3_scale"
    features = [name for name in state if name.startswith("backbone.features.")]
    names |= {name: name.replace("backbone", "backbone.bottom_up", 1) for name in features}
    heads = [f"{i}.{kind}" for i in range(6) for kind in _KINDS]
    names |= {f"head.regression_head.module_list.{x}": f"head.bbox_pred.{x}" for x in heads}
    converted = {new: state[old] for old, new in names.items()}
    for x in heads:
        num_anchors = len(converted[f"head.bbox_pred.{x}"]) // 4
        scores = state[f"{_SCORES}.{x}"].unflatten(0, (num_anchors, -1))  # (A, background + K, ...)
        kept = range(1, scores.shape[1]) if classes is None else classes
        converted[f"head.cls_score.{x}"] = scores[:, [*kept, 0]].flatten(0, 1)
    return converted


def convert_torchvision(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Convert a checkpoint of torchvision for a detector; leave any other as it is.

    Of torchvision's COCO model a detector of 80 classes gets the scores of COCO's 80. Scores of
    other numbers of classes than the detector's are left out, and logged.
    """
    if "features.0.weight" in state:
        converted = convert_vgg16(state)
    elif f"{_SCORES}.0.bias" in state:
        is_coco = len(state[f"{_SCORES}.0.bias"]) == 4 * (_NUM_COCO_IDS + 1)
        as_coco = is_coco and model.num_classes == len(COCO_CLASSES)
        converted = convert_ssd300(state, COCO_CLASSES if as_coco else None)
    else:
        return state
    own = {name: value.shape for name, value in model.state_dict().items()}
    left_out = [k for k, v in converted.items() if own.get(k) != v.shape]
    if left_out:
        logger.warning(f"left out, as the detector has other shapes: {', '.join(left_out)}")
    return {k: v for k, v in converted.items() if k not in left_out}
