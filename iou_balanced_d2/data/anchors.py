"""Whether a detector's anchors can meet a data set's boxes, what would help, and w_loc there."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray

from ..modeling import IoUBalancedRetinaNet
from .inspection import trained_on

_MOST_ASKED = 20_000  # boxes; a share of so many is right within one percent
_W_LOC_IMAGES = 50  # as many give w_loc to some percent


@dataclass(frozen=True)
class AnchorGrid:
    """A RetinaNet's anchors: shapes that stand at every cell of a grid."""

    # (stride in pixels, (A, 2) float widths and heights) of each pyramid level.
    levels: list[tuple[int, NDArray[Any]]]
    offset: float  # place in its cell of an anchor's centre, in cells
    divisor: int  # images are padded to a multiple of it

    @classmethod
    def of(cls, cfg: CfgNode) -> "AnchorGrid":
        """The anchors of a config; this builds its backbone, without memory for the weights."""
        with torch.device("meta"):
            backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        features = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        generator = build_anchor_generator(cfg, features)
        cells = [(cell[:, 2:] - cell[:, :2]).numpy() for cell in generator.cell_anchors]
        levels = list(zip(generator.strides, cells, strict=True))
        return cls(levels, generator.offset, max(backbone.size_divisibility, 1))

    def scaled(self, scale: float) -> "AnchorGrid":
        """The same grid with anchors ``scale`` times as wide and high."""
        return replace(self, levels=[(stride, shapes * scale) for stride, shapes in self.levels])


def anchor_recall(
    cfg: CfgNode,
    content: dict[str, Any],
    *,
    anchors: AnchorGrid | None = None,
    image_scale: float = 1.0,
) -> dict[str, float]:
    """Share of each class's boxes that get an anchor at the config's anchors and image size.

    "Gets an anchor": one anchor's IoU with the box is at least the upper one of
    MODEL.RETINANET.IOU_THRESHOLDS. (The others are matched to their best anchor all the same, but
    to that one only, however bad it is.) Images are resized as for training, at the middle of the
    config's sizes, times ``image_scale``. Classes without boxes are left out.
    """
    boxes, size, classes = scaled_boxes(cfg, content, image_scale)
    best = best_anchor_iou(boxes, size, anchors or AnchorGrid.of(cfg))
    is_met = best >= cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
    of_class = {c["name"]: is_met[classes == c["id"]] for c in content["categories"]}
    return {name: float(met.mean()) for name, met in of_class.items() if len(met)}


def mean_recall(recalls: Mapping[str, float]) -> float:
    """The mean of :func:`anchor_recall` over the classes, as AP has it; NaN without any."""
    return float(np.mean([*recalls.values()])) if recalls else math.nan


def recall_in_words(recalls: Mapping[str, float]) -> str:
    """The mean over the classes, and the class with the smallest share where there are several."""
    text = f"{mean_recall(recalls):.0%} of the boxes"
    if len(recalls) < 2:
        return text
    worst = min(recalls, key=lambda name: recalls[name])
    return f"{text} (mean of {len(recalls)} classes; least: {worst}, {recalls[worst]:.0%})"


def best_anchor_iou(
    boxes: NDArray[Any], size: NDArray[Any], anchors: AnchorGrid
) -> NDArray[np.float64]:
    """IoU (G,) of each box (G, 4), XYXY in pixels, with its best anchor in an image of ``size``.

    An anchor's IoU with a box falls with the distance of their centres in x and in y. So of each
    shape only the one nearest to the box has to be looked at, not all of the grid. ``size``
    (G, 2) is the width and height of each box's image.
    """
    best = np.zeros(len(boxes))
    padded = np.ceil(size / anchors.divisor) * anchors.divisor
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    for stride, shapes in anchors.levels:
        last = np.ceil(padded / stride) - 1
        start = anchors.offset * stride
        place = np.clip(np.rint((centre - start) / stride), 0, last) * stride + start
        for anchor in shapes:
            overlap = np.minimum(place + anchor / 2, centre + extent / 2) - np.maximum(
                place - anchor / 2, centre - extent / 2
            )
            common = overlap.clip(min=0).prod(axis=1)
            np.maximum(best, common / (extent.prod(axis=1) + anchor.prod() - common), out=best)
    return best


def scaled_boxes(
    cfg: CfgNode, content: dict[str, Any], image_scale: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The objects that are trained on, as resized for training.

    Returns:
        boxes (G, 4), XYXY in pixels; width and height (G, 2) of their images; category ids (G,).
    """
    resized = {
        image["id"]: (image, _resized(cfg, image, image_scale)) for image in content["images"]
    }
    objects = trained_on(content, cfg.DATASETS.VOC_DIFFICULT)
    images = [resized[a["image_id"]] for a in objects]
    xywh = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
    old = np.array([(image["width"], image["height"]) for image, _ in images]).reshape(-1, 2)
    new = np.array([size for _, size in images]).reshape(-1, 2)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    # detectron2's mapper clips them.
    boxes = xyxy.clip(0, np.tile(old, 2)) * np.tile(new / old, 2)
    return boxes, new, np.array([a["category_id"] for a in objects])


def _shortest(cfg: CfgNode) -> float:
    """The middle of the shorter sides of images in training; 0 leaves them as they are."""
    sizes = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        return float(sizes[0] + sizes[-1]) / 2
    return float(sizes[len(sizes) // 2])


def _resized(cfg: CfgNode, image: dict[str, Any], scale: float) -> tuple[int, int]:
    """Width and height of an image in training, at ``scale`` times the config's sizes."""
    width, height = image["width"], image["height"]
    shortest, longest = _shortest(cfg), round(cfg.INPUT.MAX_SIZE_TRAIN * scale)
    if not shortest:
        return round(width * scale), round(height * scale)
    new = ResizeShortestEdge.get_output_shape(height, width, round(shortest * scale), longest)
    return new[1], new[0]


def expected_w_loc(cfg: CfgNode, content: dict[str, Any]) -> float:
    """The w_loc of eq. 4 that the rule "anchors" would measure on a sample of images, or NaN."""
    with torch.device("meta"):
        model = IoUBalancedRetinaNet(**IoUBalancedRetinaNet.from_config(cfg))
    shapes = model.backbone.output_shape()
    features = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    generator = build_anchor_generator(cfg, features)
    objects = defaultdict(list)
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    images = [image for image in content["images"] if image["id"] in objects]
    total = np.zeros(2)
    for image in images[:: max(1, len(images) // _W_LOC_IMAGES)]:
        own = {"images": [image], "annotations": objects[image["id"]]}
        boxes, size, _ = scaled_boxes(cfg, own, 1.0)
        if not len(boxes):
            continue
        divisor = max(model.backbone.size_divisibility, 1)
        padded = np.ceil(size[0, ::-1] / divisor) * divisor
        cells = [np.ceil(padded / feature.stride).astype(int) for feature in features]
        anchors = generator([torch.zeros(1, 1, *shape) for shape in cells])
        gt = Instances(tuple(padded), gt_boxes=Boxes(torch.tensor(boxes).float()))
        gt.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        (labels,), (matched,) = model.label_anchors(anchors, [gt])
        positive = labels == 0
        pairs = Boxes.cat(anchors).tensor[positive], matched[positive]
        total += [float(x) for x in model.iou_balanced_loss.sums_at_anchors(*pairs)]
    return float(total[0] / total[1]) if total[1] else math.nan


def anchor_advice(cfg: CfgNode, content: dict[str, Any]) -> str:
    """What larger images and smaller (or larger) anchors would do for :func:`mean_recall`."""
    shortest, longest = _shortest(cfg), cfg.INPUT.MAX_SIZE_TRAIN
    step = max(1, len(content["annotations"]) // _MOST_ASKED)
    sample = {**content, "annotations": content["annotations"][::step]}
    grid = AnchorGrid.of(cfg)
    larger = {
        s: mean_recall(anchor_recall(cfg, sample, anchors=grid, image_scale=s)) for s in (1.5, 2.0)
    }
    others = {
        s: mean_recall(anchor_recall(cfg, sample, anchors=grid.scaled(s)))
        for s in (0.25, 0.5, 0.75, 1.5, 2.0)
    }
    best = max(others, key=lambda scale: others[scale])
    images = ", ".join(
        f"{share:.0%} at INPUT.MIN_SIZE_TRAIN {round(shortest * s)} MAX_SIZE_TRAIN "
        f"{round(longest * s)}"
        if shortest
        else f"{share:.0%} with images {s:g} times as large"
        for s, share in larger.items()
    )
    return (
        f"it would be {images}, and {others[best]:.0%} with MODEL.ANCHOR_GENERATOR.SIZES x {best:g}"
    )
