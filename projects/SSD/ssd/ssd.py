"""SSD as a detectron2 meta-architecture, with its plain and with the IoU-balanced losses.

Letters: N images, R default boxes of one image over all feature maps, K classes, P positives,
L feature maps, A default boxes of one place. Boxes are XYXY in absolute coordinates.
"""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    RetinaNet,
    build_anchor_generator,
    build_backbone,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from iou_balanced_d2.config import loss_options
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import DetectorInterface

from .augmentation import build_augmentation
from .convert import convert_torchvision
from .default_boxes import SSDMatcher
from .losses import SSDLoss
from .vgg import xavier_init

_PLAIN = LossOptions(cls_eta=0.0, loc_lambda=0.0, normalizer="batch")


class SSDHead(nn.Module):
    """One 3x3 convolution for the scores and one for the boxes of each feature map."""

    def __init__(self, input_shape: list[ShapeSpec], num_anchors: list[int], num_classes: int):
        super().__init__()
        self.cls_score, self.bbox_pred = nn.ModuleList(), nn.ModuleList()
        for shape, num in zip(input_shape, num_anchors, strict=True):
            self.cls_score.append(nn.Conv2d(shape.channels, num * (num_classes + 1), 3, padding=1))
            self.bbox_pred.append(nn.Conv2d(shape.channels, num * 4, 3, padding=1))
        xavier_init(self)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores (N, A * (K + 1), H, W), background last, and deltas (N, A * 4, H, W)."""
        logits = [conv(x) for conv, x in zip(self.cls_score, features, strict=True)]
        deltas = [conv(x) for conv, x in zip(self.bbox_pred, features, strict=True)]
        return logits, deltas


@META_ARCH_REGISTRY.register()
class SSD(RetinaNet, DetectorInterface):
    """SSD (Liu et al., arXiv 1512.02325) with the losses of the paper.

    Of detectron2's RetinaNet it has the parts and the way from images to them; scores with a
    background, default boxes, losses and non-maximum suppression are its own.
    """

    # The author's rates follow no linear rule: 0.002 for 64 and for 16 images.
    lr_per_image = 0.0
    # Each box has K + 1 scores.
    num_background_scores = SSDLoss.num_background_scores

    @configurable
    def __init__(
        self, *, neg_pos_ratio: float = 3.0, iou_balanced: LossOptions = _PLAIN, **retinanet: Any
    ):
        """Put the parts together.

        Args:
            neg_pos_ratio: hard negatives for one positive.
            iou_balanced: the keys of ``MODEL.IOU_BALANCED``; by default the plain losses.
            retinanet: the arguments of detectron2's RetinaNet but for those of its focal loss; the
                head is an :class:`SSDHead`.
        """
        super().__init__(**retinanet)
        self.iou_balanced_loss = SSDLoss(
            neg_pos_ratio=neg_pos_ratio,
            num_classes=self.num_classes,
            box2box_transform=self.box2box_transform,
            options=iou_balanced,
            smooth_l1_beta=self.smooth_l1_beta,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The parts by ``MODEL.SSD``; the head reads all feature maps of the backbone."""
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        anchor_generator = build_anchor_generator(cfg, list(shapes.values()))
        keys = cfg.MODEL.SSD
        return {
            "backbone": backbone,
            "head": SSDHead(list(shapes.values()), anchor_generator.num_anchors, keys.NUM_CLASSES),
            "head_in_features": list(shapes),
            "anchor_generator": anchor_generator,
            "box2box_transform": Box2BoxTransform(weights=tuple(keys.BBOX_REG_WEIGHTS)),
            "anchor_matcher": SSDMatcher(keys.IOU_THRESHOLD),
            "num_classes": keys.NUM_CLASSES,
            "neg_pos_ratio": keys.NEG_POS_RATIO,
            "smooth_l1_beta": keys.SMOOTH_L1_LOSS_BETA,
            "test_score_thresh": keys.SCORE_THRESH_TEST,
            "test_topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": keys.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @classmethod
    def build_augmentation(cls, cfg: CfgNode, is_train: bool) -> list[T.Augmentation | T.Transform]:
        """See :func:`augmentation.build_augmentation`."""
        return build_augmentation(cfg, is_train)

    @classmethod
    def check_weights(cls, cfg: CfgNode) -> None:
        """Refuse to train VGG16, which has no normalisation, from scratch.

        Raises:
            UserError: naming what to pass.
        """
        if not cfg.MODEL.WEIGHTS and cfg.MODEL.BACKBONE.NAME == "build_ssd_vgg_backbone":
            raise UserError(
                "VGG16 does not learn from scratch: give MODEL.WEIGHTS a file or URL of "
                "torchvision's vgg16_features-amdegroot-88682ab5.pth, vgg16 or ssd300_vgg16"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module; also takes torchvision's VGG16 and SSD300 (see ``convert.py``)."""
        return super().load_state_dict(convert_torchvision(state_dict, self), *args, **kwargs)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The images normalised, as one batch.

        Raises:
            UserError: if one is not of the size that the default boxes are for.
        """
        images = super().preprocess_image(batched_inputs)
        size = getattr(self.anchor_generator, "size", None)  # None of another generator
        if size is not None and not torch.jit.is_tracing():
            for found in images.image_sizes:
                if tuple(found) != (size, size):
                    raise UserError(
                        f"SSD takes images of MODEL.SSD.SIZE, {size}x{size}, and got one of "
                        f"{found[1]}x{found[0]}: resize them, e.g. by iou_balanced_d2's Trainer, "
                        f"and set TEST.AUG.MIN_SIZES ({size},) for test-time augmentation"
                    )
        return images

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Label the default boxes and compute the losses."""
        pred_logits, pred_anchor_deltas = self._transpose_dense_predictions(
            predictions, [self.num_classes + 1, 4]
        )
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See :meth:`IoUBalancedLoss.forward`; the scores have a background, last."""
        return self.iou_balanced_loss(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
    ) -> list[Instances]:
        """Detections of each image: "pred_boxes", "scores" and "pred_classes"."""
        pred_logits, pred_anchor_deltas = self._transpose_dense_predictions(
            predictions, [self.num_classes + 1, 4]
        )
        anchors = self.anchor_generator(features)
        return [
            self.inference_single_image(
                anchors,
                [x[i].float().softmax(dim=1)[:, :-1] for x in pred_logits],
                [x[i] for x in pred_anchor_deltas],
                image_size,
            )
            for i, image_size in enumerate(images.image_sizes)
        ]

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[Tensor],
        box_delta: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """The best boxes of each class, and non-maximum suppression among them.

        Args:
            anchors: L Boxes of R_l default boxes.
            box_cls: L tensors (R_l, K) of scores.
            box_delta: L tensors (R_l, 4).
            image_size: height and width.

        Returns:
            at most ``max_detections_per_image`` detections, the best first.
        """
        scores = torch.cat(box_cls)
        num_candidates = min(self.test_topk_candidates, len(scores))
        scores, rows = scores.topk(num_candidates, dim=0)  # (num_candidates, K)
        kept = scores > self.test_score_thresh
        classes = kept.nonzero()[:, 1]
        scores, rows = scores[kept], rows[kept]
        boxes = Boxes(
            self.box2box_transform.apply_deltas(
                torch.cat(box_delta)[rows], Boxes.cat(anchors).tensor[rows]
            )
        )
        boxes.clip(image_size)
        keep = batched_nms(boxes.tensor, scores, classes, self.test_nms_thresh)
        keep = keep[: self.max_detections_per_image]
        return Instances(
            image_size, pred_boxes=boxes[keep], scores=scores[keep], pred_classes=classes[keep]
        )


@META_ARCH_REGISTRY.register()
class IoUBalancedSSD(SSD):
    """SSD with the IoU-balanced losses: same parameters, same inference.

    Its ``state_dict`` is SSD's, so checkpoints load strictly both ways.
    """

    @configurable
    def __init__(self, *, iou_balanced: LossOptions, **ssd: Any):
        """Build SSD and its losses.

        Args:
            iou_balanced: the keys of ``MODEL.IOU_BALANCED``.
            ssd: the arguments of :class:`SSD`.

        Raises:
            ValueError: if an option is not for SSD; the message names the key.
        """
        super().__init__(iou_balanced=iou_balanced, **ssd)
        if iou_balanced.cls_loss != "iou_balanced":
            raise ValueError(
                "MODEL.IOU_BALANCED.CLS_LOSS must be iou_balanced, got "
                f"{iou_balanced.cls_loss!r}: SSD's scores are a softmax, and that loss needs a "
                "sigmoid for each class"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """SSD's arguments and the options of ``MODEL.IOU_BALANCED``."""
        return {**super().from_config(cfg), "iou_balanced": loss_options(cfg)}
