"""SSD's augmentation: colours, zooming out, crops that keep an object, flipping, a fixed size.

Source: Liu et al., "SSD: Single Shot MultiBox Detector", arXiv 1512.02325, sections 2.2 and 3.6.
Images are (H, W, 3) uint8, boxes XYXY in absolute coordinates.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from torchvision.ops import box_iou

# Smallest IoU of a crop with an object, drawn for each image; None leaves it whole, 0 asks only
# for an object's centre.
CROP_IOUS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
_CROP_TRIALS = 50

Array = npt.NDArray[np.float64]


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation | T.Transform]:
    """The augmentations of MODEL.SSD.SIZE, INPUT.SSD_AUG and INPUT.RANDOM_FLIP, in their order."""
    resize = T.Resize((cfg.MODEL.SSD.SIZE, cfg.MODEL.SSD.SIZE))
    if not is_train:
        return [resize]
    augmentations: list[T.Augmentation | T.Transform] = [resize]
    if cfg.INPUT.SSD_AUG:
        augmentations = [
            ColorAugSSDTransform(cfg.INPUT.FORMAT),
            RandomExpand(cfg.MODEL.PIXEL_MEAN),
            RandomIoUCrop(),
            resize,
        ]
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    return augmentations


class ExpandTransform(T.PadTransform):
    """Padding with a colour."""

    def apply_image(self, img: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Put an image (H, W, C) on a larger canvas of the colour ``pad_value`` (C,)."""
        height, width = img.shape[:2]
        canvas = np.empty(
            (height + self.y0 + self.y1, width + self.x0 + self.x1, img.shape[2]), img.dtype
        )
        canvas[:] = np.asarray(self.pad_value, img.dtype)
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return canvas


class RandomExpand(T.Augmentation):
    """Zoom out half of the images: somewhere on a canvas of the mean colour, up to 4 times as wide.

    Args:
        mean: colour of the canvas, in the order of the image's channels.
    """

    def __init__(self, mean: Sequence[float]):
        super().__init__()
        self.mean = mean

    def get_transform(self, image: npt.NDArray[np.uint8]) -> T.Transform:
        """Draw the size of the canvas and the place on it."""
        if self._rand_range() >= 0.5:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        ratio = self._rand_range(1.0, 4.0)
        extra_x, extra_y = int(width * (ratio - 1)), int(height * (ratio - 1))
        left, top = int(self._rand_range(extra_x + 1)), int(self._rand_range(extra_y + 1))
        return ExpandTransform(
            left, top, extra_x - left, extra_y - top, width, height, np.round(self.mean)
        )


class CenterCropTransform(T.CropTransform):
    """A crop that keeps the objects whose centre is in it; boxes of the others become empty."""

    def apply_box(self, box: Array) -> Array:
        """Crop boxes (M, 4); 0 for a centre outside, as detectron2's mapper drops empty boxes."""
        window = np.array([self.x0, self.y0, self.x0 + self.w, self.y0 + self.h])
        box = np.asarray(box, dtype=np.float64).reshape(-1, 4)
        clipped = np.concatenate(
            [np.maximum(box[:, :2], window[:2]), np.minimum(box[:, 2:], window[2:])], axis=1
        )
        inside = centers_inside(box, window[None])[0]
        return np.where(inside[:, None], clipped - np.tile(window[:2], 2), 0.0)


class RandomIoUCrop(T.Augmentation):
    """A random part of the image whose IoU with one of the objects reaches a threshold.

    The threshold is drawn from ``CROP_IOUS``. The part's sides are 0.3 to 1 times the image's, one
    at most twice as long as the other.
    """

    def get_transform(self, image: npt.NDArray[np.uint8], boxes: Array) -> T.Transform:
        """Draw the part; it is the whole image if there are no boxes or None is drawn."""
        height, width = image.shape[:2]
        while len(boxes):
            min_iou = CROP_IOUS[np.random.randint(len(CROP_IOUS))]
            if min_iou is None:
                break
            windows = self._draw_windows(width, height)
            inside = centers_inside(boxes, windows)
            iou = box_iou(torch.from_numpy(windows), torch.as_tensor(boxes)).numpy()
            best = np.where(inside, iou, -1.0).max(axis=1, initial=-1.0)
            good = np.flatnonzero(best >= min_iou)
            if len(good):
                x0, y0, x1, y1 = windows[good[0]].astype(int).tolist()
                return CenterCropTransform(x0, y0, x1 - x0, y1 - y0, width, height)
        return T.NoOpTransform()

    def _draw_windows(self, width: int, height: int) -> Array:
        """Draw parts of the image, (at most 50, 4) with whole numbers."""
        sides = self._rand_range(0.3, 1.0, (_CROP_TRIALS, 2)) * [width, height]
        sides = np.maximum(sides.astype(int), 1)
        ratio = sides[:, 0] / sides[:, 1]
        sides = sides[(ratio >= 0.5) & (ratio <= 2.0)]
        corner = (self._rand_range(size=sides.shape) * ([width, height] - sides + 1)).astype(int)
        return np.concatenate([corner, corner + sides], axis=1).astype(np.float64)


def centers_inside(boxes: Array, windows: Array) -> npt.NDArray[np.bool_]:
    """Whether a window (W, 4) holds the centre of a box (M, 4): (W, M) bool."""
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    after = center[None] >= windows[:, None, :2]
    before = center[None] < windows[:, None, 2:]
    return np.all(after & before, axis=2)
