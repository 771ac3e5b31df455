"""Pictures of the worst cases: where the score is wrong about the box. Boxes are XYXY."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer
from numpy.typing import NDArray

from ...evaluation.detections import GroundTruth
from .analysis import Alignment
from .measures import MIN_IOU, WELL_PLACED

logger = logging.getLogger(__name__)

_SIZE = 480  # pixels of a picture's longer side
_CONTEXT = 0.35  # seen around the boxes, as a share of their extent
# Ground truth is dashed, so that it can be told by more than its colour.
GT_COLOR, TOP_COLOR, PLACED_COLOR = "#FFFFFF", "#E69F00", "#56B4E9"


@dataclass(frozen=True)
class Case:
    """One object and the detections to show on it."""

    gt: int  # row of the object
    detections: Sequence[int]  # rows of the detections, the best-scored one first; one or two


def misplaced_cases(alignment: Alignment, most: int) -> list[Case]:
    """The best-scored detections whose box is bad: IoU from .1 to below .5."""
    best, scores = alignment.best, alignment.detections.scores
    bad = np.flatnonzero((best.iou >= MIN_IOU) & (best.iou < WELL_PLACED) & ~best.ignored)
    rows = bad[np.argsort(-scores[bad], kind="stable")][:most]
    return [Case(int(best.gt[row]), [int(row)]) for row in rows]


def outranked_cases(alignment: Alignment, most: int) -> list[Case]:
    """Objects whose best-placed box is outranked, by IoU lost times the score that lost it."""
    top, placed = alignment.outranked["top"], alignment.outranked["placed"]
    lost = alignment.best.iou[placed] - alignment.best.iou[top]
    cost = lost * alignment.detections.scores[top]
    rows = [row for row in np.argsort(-cost, kind="stable")[:most] if lost[row] > 0]
    gt = alignment.outranked["gt"]
    return [Case(int(gt[row]), [int(top[row]), int(placed[row])]) for row in rows]


def draw_cases(
    ground_truth: GroundTruth,
    alignment: Alignment,
    cases: Sequence[Case],
    image_root: str,
    stem: Path,
) -> tuple[list[Path], list[str]]:
    """Draw each case into a JPEG file, whose path begins with ``stem``, and write a caption for it.

    An image that can't be read is logged and left out.
    """
    files, captions = [], []
    for number, case in enumerate(cases, start=1):
        name = ground_truth.images[ground_truth.image[case.gt]]["file_name"]
        try:
            image = read_image(os.path.join(image_root, name), "RGB")
        except (OSError, SyntaxError) as error:  # PIL raises the latter on broken PNGs
            logger.warning(f"{name}: can't be read, left out of the pictures: {error}")
            continue
        file = stem.with_name(f"{stem.name}_{number}.jpg")
        picture = _draw(image, ground_truth, alignment, case)
        cv2.imwrite(str(file), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
        files.append(file)
        captions.append(_caption(ground_truth, alignment, case, name))
    return files, captions


def _caption(ground_truth: GroundTruth, alignment: Alignment, case: Case, name: str) -> str:
    label = ground_truth.classes[ground_truth.label[case.gt]]
    shown = [_label(alignment, row) for row in case.detections]
    return f"{name}: {label}, " + "; better placed: ".join(shown)


def _label(alignment: Alignment, row: int) -> str:
    return f"score {alignment.detections.scores[row]:.2f}, IoU {alignment.best.iou[row]:.2f}"


def _draw(
    image: NDArray[Any], ground_truth: GroundTruth, alignment: Alignment, case: Case
) -> NDArray[Any]:
    """The part of an image (H, W, 3) uint8 RGB around the case, with its boxes drawn."""
    found = alignment.detections.boxes[list(case.detections)]
    boxes = np.concatenate([ground_truth.boxes[case.gt][None], found])
    left, top, right, bottom = _window(boxes, image.shape[0], image.shape[1])
    part = np.ascontiguousarray(image[top:bottom, left:right])
    scale = _SIZE / max(part.shape[:2])
    part = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    height, width = part.shape[:2]
    boxes = ((boxes - [left, top, left, top]) * scale).clip(1, [width - 2, height - 2] * 2)
    visualizer = Visualizer(part)
    visualizer.draw_box(boxes[0], alpha=1, edge_color=GT_COLOR, line_style="--")
    # The labels stand in the corners, as those of neighbours would lie over each other.
    looks = ((TOP_COLOR, 5), (PLACED_COLOR, height - 29))
    for box, row, (color, y) in zip(boxes[1:], case.detections, looks, strict=False):
        visualizer.draw_box(box, alpha=1, edge_color=color)
        visualizer.draw_text(
            _label(alignment, row), (5, y), font_size=17, color=color, horizontal_alignment="left"
        )
    return visualizer.output.get_image()


def _window(boxes: NDArray[Any], height: int, width: int) -> tuple[int, int, int, int]:
    """The part of the image (left, top, right, bottom) that shows the boxes and what is around."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    margin = max(float((high - low).max()) * _CONTEXT, 16)
    left, top = np.floor((low - margin).clip(0, [width - 1, height - 1])).astype(int)
    right, bottom = np.ceil((high + margin).clip([left + 1, top + 1], [width, height])).astype(int)
    return int(left), int(top), int(right), int(bottom)
