"""Draw the detections of an evaluated run beside the ground truth.

python tools/visualize_results.py --config-file configs/Demo/retinanet_demo_iou_balanced.yaml
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from tqdm import tqdm

from ..analysis.boxes import draw_boxes
from ..data import check_datasets
from ..data.coco_format import load_json
from ..data.loading import CheckedMapper
from ..engine import load_config
from ..errors import UserError
from ..files import make_folder

# Small images are enlarged to about this width, so that thin lines and labels can be read.
MIN_WIDTH = 640
# No picture is drawn larger: drawing takes some 50 bytes a pixel.
MAX_SIDE = 6000


def picture_scale(image: np.ndarray) -> float:
    """Of the picture to the image (h, w, 3): small ones are enlarged, huge ones reduced."""
    return min(max(1.0, MIN_WIDTH / image.shape[1]), MAX_SIDE / max(image.shape[:2]))


def read_detections(cfg: CfgNode, name: str) -> dict[int, list[dict[str, Any]]]:
    """The detections that the evaluation left, by image id."""
    path = Path(cfg.OUTPUT_DIR, "inference", name, "coco_instances_results.json")
    if not path.is_file():
        raise UserError(f"{path} not found: train, or evaluate with train_net.py --eval-only")
    by_image = defaultdict(list)
    for detection in load_json(str(path)):
        by_image[detection["image_id"]].append(detection)
    return by_image


def draw_pair(
    record: dict[str, Any], found: list[dict[str, Any]], metadata: Metadata, threshold: float
) -> np.ndarray:
    """Detections on the left, ground truth on the right; (H, W, 3) uint8 RGB."""
    read = CheckedMapper(lambda d: read_image(d["file_name"], "RGB"), metadata.name)
    image: Any = read(record)
    scale, names = picture_scale(image), metadata.thing_classes
    # Data sets that detectron2 converted have no other ids than the indices.
    to_class = metadata.get("thing_dataset_id_to_contiguous_id") or range(len(names))
    kept = sorted((d for d in found if d["score"] >= threshold), key=lambda d: -d["score"])
    if unknown := {d["category_id"] for d in kept}.difference(to_class):
        raise UserError(
            f"a detection on {record['file_name']!r} is of category_id {unknown.pop()!r}, which "
            f"data set {metadata.name!r} lacks: evaluate anew with train_net.py --eval-only"
        )
    boxes = [BoxMode.convert(d["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for d in kept]
    classes = [to_class[d["category_id"]] for d in kept]
    labels = [f"{names[k]} {d['score']:.0%}" for k, d in zip(classes, kept, strict=True)]
    left = draw_boxes(image, boxes, classes, labels, scale)
    objects = record.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    classes = [a["category_id"] for a in objects]
    labels = [names[a["category_id"]] + "|crowd" * a.get("iscrowd", 0) for a in objects]
    right = draw_boxes(image, boxes, classes, labels, scale)
    title = f"detections of score {threshold:g} or more"
    return np.concatenate([titled(left, title), titled(right, "ground truth")], axis=1)


def titled(picture: np.ndarray, title: str) -> np.ndarray:
    """The picture (H, W, 3) uint8 under a white strip with its title."""
    height = max(32, picture.shape[1] // 20)
    strip = np.full((height, *picture.shape[1:]), 255, np.uint8)
    place, size = (height // 4, height * 3 // 4), height / 40
    cv2.putText(strip, title, place, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), height // 16)
    return np.concatenate([strip, picture])


def free_name(file: Path, written: set[str]) -> str:
    """The picture's file name: the image's, numbered where folders have files of the same name."""
    suffix = file.suffix if file.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
    name, number = file.stem + suffix, 1
    while name in written:
        number += 1
        name = f"{file.stem}_{number}{suffix}"
    written.add(name)
    return name


def visualize(cfg: CfgNode, output: Path, num_images: int, threshold: float) -> None:
    """Draw the first images of each data set of DATASETS.TEST into ``output``."""
    check_datasets(cfg, training=False)
    for name in cfg.DATASETS.TEST:
        detections = read_detections(cfg, name)
        records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
        make_folder(output)
        written: set[str] = set()
        for record in tqdm(records[:num_images], desc=name):
            picture = draw_pair(record, detections[record["image_id"]], metadata, threshold)
            path = output / free_name(Path(f"{name}_{Path(record['file_name']).stem}.png"), written)
            if not cv2.imwrite(str(path), picture[:, :, ::-1]):
                raise UserError(f"{path} can't be written")
    print(f"Pictures (left: detections, right: ground truth) are in {output}")


def run(args: argparse.Namespace) -> None:
    """Draw the pictures."""
    cfg = load_config(args.config_file, args.opts)
    output = Path(args.output or Path(cfg.OUTPUT_DIR, "pictures"))
    visualize(cfg, output, args.num_images, args.threshold)
