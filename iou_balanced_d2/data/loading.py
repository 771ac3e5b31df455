"""From registered data sets to training examples: bad annotations left out, bad files named."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BoxMode

from ..errors import UserError
from ..modeling import interface_of
from .voc import training_dicts

logger = logging.getLogger(__name__)


def load_training_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Load DATASETS.TRAIN, each dict with its "dataset_name", without what can't be trained on.

    Boxes of no area or outside of their image are left out and counted in one log line a data set;
    so are VOC's difficult objects, as DATASETS.VOC_DIFFICULT says, and then images without objects,
    as DATALOADER.FILTER_EMPTY_ANNOTATIONS says.
    """
    dicts = []
    for name in cfg.DATASETS.TRAIN:
        loaded = get_detection_dataset_dicts([name], filter_empty=False, check_consistency=False)
        loaded = training_dicts(drop_bad_boxes(loaded, name), cfg.DATASETS.VOC_DIFFICULT)
        dicts += [{**d, "dataset_name": name} for d in loaded]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if not dicts:
        raise UserError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: no image has a usable box")
    # That all data sets have the same classes is checked before the launch (check_datasets).
    if classes := MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes"):
        print_instances_class_histogram(dicts, classes)
    return dicts


def drop_bad_boxes(dicts: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Leave out boxes that no anchor can be matched to; the data set itself is not changed."""
    kept, dropped = [], 0
    for i, d in enumerate(dicts):
        if missing := {"width", "height"} - d.keys():
            raise UserError(f"data set {name!r}: record {i} has no {max(missing)!r}")
        given = d.get("annotations", [])
        annotations = [a for a in given if is_good_box(a, d["width"], d["height"])]
        dropped += len(given) - len(annotations)
        kept.append({**d, "annotations": annotations})
    if dropped:
        logger.warning(
            f"data set {name!r}: {dropped} boxes of no area or outside of their image are left out "
            "of training (tools/check_dataset.py names them)"
        )
    return kept


def is_good_box(annotation: dict[str, Any], width: int, height: int) -> bool:
    """Whether the part of the annotation's box inside the image (in pixels) has an area."""
    x1, y1, x2, y2 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    inside_x = min(x2, width) - max(x1, 0)
    inside_y = min(y2, height) - max(y1, 0)
    return bool(np.isfinite([x1, y1, x2, y2]).all() and inside_x > 0 and inside_y > 0)


def build_mapper(cfg: CfgNode, *, is_train: bool) -> DatasetMapper:
    """detectron2's mapper, or one with the detector's own augmentations (DetectorInterface)."""
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    augmentations = interface_of(detector).build_augmentation(cfg, is_train)
    if augmentations is None:
        return DatasetMapper(cfg, is_train=is_train)
    return BoxMapper(cfg, is_train=is_train, augmentations=augmentations)


class BoxMapper(DatasetMapper):
    """detectron2's mapper of images with boxes, whose augmentations see the boxes, too."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict; crowds are not shown to the augmentations."""
        dataset_dict = copy.deepcopy(dataset_dict)
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
        utils.check_image_size(dataset_dict, image)
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in dataset_dict.get("annotations", ())
            if not a.get("iscrowd", 0)
        ]
        inputs = T.AugInput(image, boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
        transforms = self.augmentations(inputs)
        pixels = np.ascontiguousarray(inputs.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.as_tensor(pixels)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, inputs.image.shape[:2])
        return dataset_dict


class CheckedMapper:
    """A mapper whose errors name the image and its data set."""

    def __init__(self, mapper: Callable[[dict[str, Any]], Any], name: str = ""):
        self.mapper = mapper
        self.name = name

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map one dataset dict; a UserError if the image is missing, broken, or of another size."""
        try:
            return self.mapper(dataset_dict)
        except Exception as error:  # PIL raises SyntaxError and others on broken files
            name = dataset_dict.get("dataset_name", self.name)
            reason = " ".join(str(error).split()) or type(error).__name__
            image = dataset_dict.get("file_name", dataset_dict.get("image_id"))
            raise UserError(
                f"data set {name!r}: image {image!r} can't be used: {reason}"
            ) from error
