"""Draw the detections of an evaluated run beside the ground truth.

python tools/visualize_results.py --config-file configs/Demo/retinanet_demo_iou_balanced.yaml
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from ..data import check_datasets
from ..engine import load_config
from ..errors import UserError

# Small images are enlarged to about this width, so that thin lines and labels can be read.
MIN_WIDTH = 640


def read_detections(cfg: CfgNode, name: str) -> dict[int, list[dict[str, Any]]]:
    """The detections that the evaluation left, by image id."""
    path = Path(cfg.OUTPUT_DIR, "inference", name, "coco_instances_results.json")
    if not path.is_file():
        raise UserError(f"{path} not found: train, or evaluate with train_net.py --eval-only")
    by_image = defaultdict(list)
    for detection in json.loads(path.read_text()):
        by_image[detection["image_id"]].append(detection)
    return by_image


def to_instances(
    detections: list[dict[str, Any]], size: tuple[int, int], metadata: Metadata, threshold: float
) -> Instances:
    """COCO detections of one image (height, width) as detectron2 Instances, best score first."""
    kept = sorted((d for d in detections if d["score"] >= threshold), key=lambda d: -d["score"])
    to_class = metadata.get("thing_dataset_id_to_contiguous_id")
    boxes = np.array([d["bbox"] for d in kept], dtype=np.float32).reshape(-1, 4)
    instances = Instances(size)
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = np.array([d["score"] for d in kept])
    instances.pred_classes = np.array([to_class[d["category_id"]] for d in kept], dtype=int)
    return instances


def draw_pair(record: dict[str, Any], instances: Instances, metadata: Metadata) -> np.ndarray:
    """Predictions on the left, ground truth on the right; (H, W, 3) uint8 RGB."""
    image = read_image(record["file_name"], "RGB")
    scale = max(1.0, MIN_WIDTH / image.shape[1])
    left = Visualizer(image, metadata, scale=scale).draw_instance_predictions(instances)
    right = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
    return np.concatenate([left.get_image(), right.get_image()], axis=1)


def free_name(stem: str, written: set[str]) -> str:
    """The picture's file name, numbered where folders of the data set have files of one name."""
    name, number = f"{stem}.png", 1
    while name in written:
        number += 1
        name = f"{stem}_{number}.png"
    written.add(name)
    return name


def visualize(cfg: CfgNode, output: Path, num_images: int, threshold: float) -> None:
    """Draw the first images of each data set of DATASETS.TEST into ``output``."""
    check_datasets(cfg, training=False)
    for name in cfg.DATASETS.TEST:
        detections = read_detections(cfg, name)
        records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
        output.mkdir(parents=True, exist_ok=True)
        written: set[str] = set()
        for record in tqdm(records[:num_images], desc=name):
            size = (record["height"], record["width"])
            found = detections[record["image_id"]]
            picture = draw_pair(record, to_instances(found, size, metadata, threshold), metadata)
            path = output / free_name(f"{name}_{Path(record['file_name']).stem}", written)
            if not cv2.imwrite(str(path), picture[:, :, ::-1]):
                raise UserError(f"{path} can't be written")
    print(f"Pictures (left: detections, right: ground truth) are in {output}")


def run(args: argparse.Namespace) -> None:
    """Draw the pictures."""
    cfg = load_config(args.config_file, args.opts)
    output = Path(args.output or Path(cfg.OUTPUT_DIR, "pictures"))
    visualize(cfg, output, args.num_images, args.threshold)
