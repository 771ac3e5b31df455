"""What is wrong with a data set, and whether a detector's anchors can meet its boxes."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_anchor_generator, build_backbone
from detectron2.structures import Boxes, ImageList, pairwise_iou
from PIL import Image
from tqdm import tqdm

# What a problem is called -> what it means. The first ones leave a box out of training.
PROBLEMS = {
    "no area": "box without width or height, or not a number; left out of training",
    "outside": "box with no part inside the image; left out of training",
    "sticks out": "box partly outside the image; the part inside is used",
    "unknown category": "category_id that is not among the categories",
    "unknown image": "image_id that is not among the images",
    "duplicate id": "id of more than one image, annotation or category",
    "missing image": "image file that is not there",
    "unreadable image": "image file that can't be decoded to its end",
    "size mismatch": "image file of another size than annotated",
}
_TOLERANCE = 0.5  # pixels; annotation tools round to whole ones


@dataclass
class Report:
    """What was found in one data set.

    Attributes:
        num_images: number of images.
        num_annotations: number of annotations.
        num_empty: number of images without annotations.
        classes: number of annotations of each class.
        problems: name of the problem -> where, each "file, annotation id: what".
    """

    num_images: int
    num_annotations: int
    num_empty: int
    classes: dict[str, int]
    problems: dict[str, list[str]] = field(default_factory=dict)

    def add(self, problems: Iterable[tuple[str, str]]) -> None:
        """Take in (name of the problem, where) pairs."""
        for name, where in problems:
            self.problems.setdefault(name, []).append(where)

    @property
    def num_problems(self) -> int:
        """Number of problems of all kinds."""
        return sum(map(len, self.problems.values()))


def inspect_annotations(content: dict[str, Any]) -> Report:
    """The cheap part: everything that the annotations alone tell.

    Args:
        content: of COCO's instance format, see :func:`read_coco_json`.

    Returns:
        the report; reading the images is :func:`inspect_images`.
    """
    names = {c["id"]: c["name"] for c in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    annotations = content["annotations"]
    histogram = Counter(a["category_id"] for a in annotations)
    report = Report(
        num_images=len(content["images"]),
        num_annotations=len(annotations),
        num_empty=len(images.keys() - {a["image_id"] for a in annotations}),
        classes={name: histogram.get(id_, 0) for id_, name in sorted(names.items())},
    )
    for section in ("images", "annotations", "categories"):
        ids = Counter(row.get("id") for row in content[section] if "id" in row)
        report.add(
            ("duplicate id", f"{section}: id {id_}, {n} times") for id_, n in ids.items() if n > 1
        )
    for annotation in annotations:
        report.add(_annotation_problems(annotation, images, names))
    return report


def _annotation_problems(
    annotation: dict[str, Any], images: dict[Any, dict[str, Any]], names: dict[Any, str]
) -> Iterator[tuple[str, str]]:
    which = f"annotation {annotation.get('id', '(no id)')}"
    image = images.get(annotation["image_id"])
    if annotation["category_id"] not in names:
        yield "unknown category", f"{which}: category_id {annotation['category_id']}"
    if image is None:
        yield "unknown image", f"{which}: image_id {annotation['image_id']}"
        return
    where = f"{image['file_name']}, {which}: box {annotation['bbox']}"
    x, y, w, h = (float(v) for v in annotation["bbox"])
    if not (np.isfinite([x, y, w, h]).all() and w > 0 and h > 0):
        yield "no area", where
    elif x >= image["width"] or y >= image["height"] or x + w <= 0 or y + h <= 0:
        yield "outside", where
    elif (
        min(x, y) < -_TOLERANCE
        or x + w > image["width"] + _TOLERANCE
        or y + h > image["height"] + _TOLERANCE
    ):
        yield "sticks out", where


def inspect_images(content: dict[str, Any], image_root: str, *, threads: int = 4) -> Report:
    """The full part: decode every image.

    Args:
        content: of COCO's instance format.
        image_root: folder of the images.
        threads: images read at a time.

    Returns:
        a report with the images' problems only.
    """
    report = Report(len(content["images"]), 0, 0, {})
    with ThreadPool(threads) as pool:
        found = pool.imap(lambda image: _image_problem(image, image_root), content["images"])
        for problem in tqdm(found, total=len(content["images"]), desc="images", leave=False):
            report.add([problem] if problem else [])
    return report


def _image_problem(image: dict[str, Any], image_root: str) -> tuple[str, str] | None:
    path = os.path.join(image_root, image["file_name"])
    if not os.path.isfile(path):
        return "missing image", path
    try:
        with Image.open(path) as file:
            file.load()
            size = file.size
    except Exception as error:  # PIL raises SyntaxError and others on broken files
        return "unreadable image", f"{path}: {' '.join(str(error).split())}"
    annotated = (image["width"], image["height"])
    if size != annotated:
        return (
            "size mismatch",
            f"{path}: {size[0]}x{size[1]}, annotated {annotated[0]}x{annotated[1]}",
        )
    return None


def anchor_recall(cfg: CfgNode, content: dict[str, Any], *, max_images: int = 500) -> float:
    """Share of the ground truth that gets an anchor at the config's anchors and image size.

    "Gets an anchor": one anchor's IoU with the box is at least the upper one of
    MODEL.RETINANET.IOU_THRESHOLDS. (The others are matched to their best anchor all the same, but
    to that one only, however bad it is.)

    Args:
        cfg: config of a RetinaNet; images are resized as for training, at the middle of its sizes.
        content: of COCO's instance format.
        max_images: number of images looked at, spread evenly over the data set.

    Returns:
        share in [0, 1]; NaN without any box.
    """
    with torch.device("meta"):
        shapes = build_backbone(cfg).output_shape()
    features = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    generator = build_anchor_generator(cfg, features)
    boxes: dict[Any, list[list[float]]] = {}
    for a in content["annotations"]:
        if a["bbox"][2] > 0 and a["bbox"][3] > 0 and not a.get("iscrowd", 0):
            boxes.setdefault(a["image_id"], []).append(a["bbox"])
    images = [image for image in content["images"] if image["id"] in boxes]
    images = images[:: max(1, math.ceil(len(images) / max_images))]
    strides = [feature.stride for feature in features]
    with warnings.catch_warnings():
        # From detectron2's anchor generator: nothing a user could mend.
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        matched = [
            _best_iou(cfg, generator, strides, image, boxes[image["id"]]) for image in images
        ]
    if not matched:
        return float("nan")
    best = torch.cat(matched)
    return (best >= cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]).float().mean().item()


def _best_iou(
    cfg: CfgNode, generator: Any, strides: list[int], image: dict[str, Any], boxes: list[Any]
) -> torch.Tensor:
    """Each box's IoU with its best anchor, (G,), boxes in XYWH pixels of the original image."""
    sizes = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    height, width = ResizeShortestEdge.get_output_shape(
        image["height"], image["width"], sizes[len(sizes) // 2], cfg.INPUT.MAX_SIZE_TRAIN
    )
    scale = torch.tensor([width / image["width"], height / image["height"]] * 2)
    xywh = torch.tensor(boxes, dtype=torch.float32)
    xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1) * scale
    padded = ImageList.from_tensors([torch.empty(1, height, width)], max(strides)).tensor.shape
    maps = [torch.empty(1, 1, math.ceil(padded[2] / s), math.ceil(padded[3] / s)) for s in strides]
    anchors = Boxes.cat(generator(maps))
    if not len(anchors):  # an image so narrow that nothing of it is left
        return torch.zeros(len(boxes))
    return pairwise_iou(Boxes(xyxy), anchors).amax(dim=1)
