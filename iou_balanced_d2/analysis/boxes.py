"""Boxes drawn on an image: a colour a class, and labels that can be read. Boxes are XYXY."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from numpy.typing import ArrayLike

from ..evaluation.detections import Array

_COLORS = colormap(rgb=True, maximum=1)  # of some 80 classes
_TEXT = 16  # least height of the labels, pixels


def draw_boxes(
    image: Array,
    boxes: ArrayLike,
    classes: Sequence[int],
    labels: Sequence[str],
    scale: float = 1.0,
) -> Array:
    """Draw boxes (B, 4) on an image (H, W, 3) uint8 RGB; the picture is ``scale`` times as large.

    The most important box comes first: it lies above the others, and its label has the choice of
    places. Each class has its colour, whatever the image.
    """
    # Resized first, as the lines of detectron2's visualizer grow with its own scale.
    picture = cv2.resize(image, None, fx=scale, fy=scale) if scale != 1 else image
    height, width = picture.shape[:2]
    visualizer = Visualizer(picture)
    text = max(_TEXT, (height * width) ** 0.5 / 45)
    colors = [tuple(_COLORS[k % len(_COLORS)]) for k in classes]
    scaled = np.reshape(boxes, (-1, 4)) * scale
    sizes = [(0.62 * text * len(label), 1.3 * text) for label in labels]
    for box, color in reversed(list(zip(scaled, colors, strict=True))):
        visualizer.draw_box(box, alpha=1, edge_color=color)
    places = _places(scaled, sizes, width, height)
    for (x, y), label, color in zip(places, labels, colors, strict=True):
        is_light = np.dot(color, (0.3, 0.6, 0.1)) > 0.5
        visualizer.output.ax.text(
            x, y, label.replace("$", r"\$"), size=text * 72 / visualizer.output.fig.dpi,
            color="black" if is_light else "white", zorder=10, verticalalignment="top",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    drawn: Array = visualizer.output.get_image()
    return drawn


def _places(
    boxes: Array, sizes: Sequence[tuple[float, float]], width: int, height: int
) -> Iterator[tuple[float, float]]:
    """Left upper corner of each label (its width, height): at its box, clear of those before."""
    taken: list[tuple[float, float, float, float]] = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes, strict=True):
        corners = [(x0, y0 - h), (x0, y0), (x0, y1), (x1 - w, y1 - h), (x1 - w, y0 - h), (x1, y0)]
        inside = [(max(min(x, width - w), 0), max(min(y, height - h), 2)) for x, y in corners]
        free = (
            (x, y)
            for x, y in inside
            if all(x >= r or x + w <= l or y >= b or y + h <= t for l, t, r, b in taken)  # noqa: E741
        )
        x, y = next(free, inside[0])
        taken.append((x, y, x + w, y + h))
        yield x, y
