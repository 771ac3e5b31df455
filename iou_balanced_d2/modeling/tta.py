"""Test-time augmentation of dense detectors, which detectron2 has for its R-CNNs only.

The detector gets an image in several sizes, and mirrored. The boxes found before non-maximum
suppression are mapped back into the original image and go through one suppression together.
"""

import copy
import itertools
import math
import sys
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import TransformList
from detectron2.layers import batched_nms
from detectron2.modeling import DatasetMapperTTA, detector_postprocess
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError

Input = dict[str, Any]


class DenseDetectorWithTTA(nn.Module):
    """A dense detector with test-time augmentation; it is called as the detector itself.

    For RetinaNet, FCOS, SSD and any other :class:`DenseDetector` that suppresses by
    ``test_nms_thresh`` and keeps ``max_detections_per_image``.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """Wrap a detector.

        Args:
            cfg: the full config; TEST.AUG.MIN_SIZES, MAX_SIZE and FLIP and INPUT.FORMAT are
                read.
            model: the detector, wrapped in DDP or not; its weights are used, not copied.

        Raises:
            UserError: if the detector is of another kind.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        needed = ("forward_inference", "test_nms_thresh", "max_detections_per_image")
        if not isinstance(model, DenseDetector) or not all(hasattr(model, name) for name in needed):
            raise UserError(
                f"TEST.AUG.ENABLED: {type(model).__name__} is no dense detector, such as RetinaNet "
                "or FCOS; set TEST.AUG.ENABLED False"
            )
        self.model = model
        self.input_format = cfg.INPUT.FORMAT
        self.tta_mapper = DatasetMapperTTA(cfg)

    def forward(self, batched_inputs: list[Input]) -> list[dict[str, Instances]]:
        """Detect in each image.

        Args:
            batched_inputs: detectron2's inputs; without "image" the file "file_name" is read.
                Without "height" and "width" boxes are in the frame of "image".

        Returns:
            {"instances": "pred_boxes", "scores", "pred_classes"} of each image, best first.
        """
        return [{"instances": self._detect(self._complete(x))} for x in batched_inputs]

    def _complete(self, image_input: Input) -> Input:
        """The input with its image and its size."""
        complete = copy.copy(image_input)
        if "image" not in complete:
            # At its own resolution, so that each version is resampled once.
            image = read_image(complete["file_name"], self.input_format)
            complete["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        height, width = complete["image"].shape[-2:]
        complete["image"] = complete["image"].cpu()
        complete.setdefault("height", height)
        complete.setdefault("width", width)
        return complete

    def _detect(self, image_input: Input) -> Instances:
        """The detections of one image, merged over its versions."""
        parts: list[Instances] = []
        versions = self.tta_mapper(image_input)
        # An image and its mirror image, of the same size, need no padding to be one batch.
        for _, same_size in itertools.groupby(versions, key=lambda x: x["image"].shape):
            batch = list(same_size)
            transforms = [x.pop("transforms") for x in batch]
            parts += map(_map_back, self._candidates(batch), transforms)
        found = _concatenate(parts, (image_input["height"], image_input["width"]))
        keep = batched_nms(
            found.pred_boxes.tensor, found.scores, found.pred_classes, self.model.test_nms_thresh
        )
        kept = found[keep[: self.model.max_detections_per_image]]
        return detector_postprocess(kept, *found.image_size)

    @torch.no_grad()
    def _candidates(self, batch: list[Input]) -> list[Instances]:
        """The detections in each image before suppression, boxes in the frame of "image".

        These are the steps of ``DenseDetector.forward`` but for its post-processing, which would
        clip the boxes: the plain detector suppresses before it clips.
        """
        # A shallow copy, which has the same parameters; the detector itself stays as it is.
        model = copy.copy(self.model)
        # No IoU is above this, so nothing is suppressed.
        model.test_nms_thresh = math.inf
        model.max_detections_per_image = sys.maxsize
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        found: list[Instances] = model.forward_inference(images, features, model.head(features))
        return found


def _map_back(found: Instances, transforms: TransformList) -> Instances:
    """Detections in the frame before the transforms; they are changed in place."""
    boxes = found.pred_boxes.tensor
    original = transforms.inverse().apply_box(boxes.cpu().numpy())
    found.pred_boxes = Boxes(torch.from_numpy(original).to(boxes))
    return found


def _concatenate(parts: list[Instances], image_size: tuple[int, int]) -> Instances:
    """The detections of all versions as those of one image."""
    return Instances(
        image_size,
        pred_boxes=Boxes.cat([part.pred_boxes for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        pred_classes=torch.cat([part.pred_classes for part in parts]),
    )
