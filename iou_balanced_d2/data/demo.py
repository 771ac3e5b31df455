"""A small drawn data set on which a detector learns from scratch in minutes, on a CPU.

Opaque, textured shapes on a soft background: what is an object, and of which class, is easy to
see (each class keeps to a fifth of the colour wheel, as fruit does), while rotation, occlusion,
truncation, shadow, blur and noise make the exact box the hard part. That is the situation the
IoU-balanced losses are about.

Every image follows from ``(seed, index)`` alone, so the set is the same whoever draws it, in
whatever order. Geometry is rounded to a grid of :data:`_SUPERSAMPLE` steps a pixel before
anything is filled, so that boxes do not depend on the last bit of a sine; pixels may differ by
a grey level between OpenCV builds.

The box of an object is the tight bound of its *visible* pixels, as in COCO: a pixel belongs to
the topmost object that covers at least half of it. An object is only drawn if at least
``DemoSpec.min_visible`` of every object, itself included, stays visible.
"""

import colorsys
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from iopath.common.file_io import file_lock
from numpy.typing import NDArray

from .conversion import coco_content, source_digest

logger = logging.getLogger(__name__)

DEMO_CLASSES = ("ellipse", "rectangle", "triangle", "star", "cross")
_FOLDER = "iou_balanced_demo"
_STAMP = "stamp.json"
_SUPERSAMPLE = 4
_ATTEMPTS = 12
_SOURCE = source_digest(__file__)

Array = NDArray[Any]


@dataclass(frozen=True)
class DemoSpec:
    """What is drawn; a change of any field makes :func:`ensure_demo_datasets` draw anew."""

    seed: int = 0  #: seed of the whole set
    size: int = 128  #: height and width of an image, in pixels
    num_train: int = 1200  #: number of training images
    num_val: int = 200  #: number of validation images
    max_objects: int = 5  #: most objects in an image; the fewest is 2
    #: Smallest long side of a shape before it is rotated, as a share of ``size``.
    min_side: float = 0.22
    max_side: float = 0.58  #: largest one
    min_visible: float = 0.6  #: least share of a shape's area that must be visible


DEMO_SPEC = DemoSpec()


@dataclass(frozen=True)
class DemoScene:
    """One drawn image and its ground truth."""

    image: Array  #: (H, W, 3) uint8, BGR
    owner: Array  #: (H, W) int32, the row of the object seen at each pixel, -1 for background
    labels: Array  #: (G,) int64, index into :data:`DEMO_CLASSES`
    #: (G, 4) int64, XYXY in pixel-edge coordinates; the box of pixel (0, 0) is 0, 0, 1, 1.
    boxes: Array


def draw_scene(index: int, spec: DemoSpec = DEMO_SPEC) -> DemoScene:
    """Draws image ``index``; validation images continue the numbering of the training images.

    Args:
        index: any non-negative integer.
        spec: what to draw.

    Returns:
        The image with its boxes; G is at least 1.
    """
    rng = np.random.default_rng((spec.seed, index))
    canvas = _background(rng, spec.size)
    owner: Array = np.full((spec.size, spec.size), -1, dtype=np.int32)
    areas: list[float] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(2, spec.max_objects + 1))):
        for _ in range(_ATTEMPTS):
            label, polygon = _random_shape(rng, spec)
            coverage = _rasterize(polygon, spec.size)
            proposal = np.where(coverage >= 0.5, np.int32(len(areas)), owner)
            proposed_areas = [*areas, _polygon_area(polygon)]
            if _all_visible(proposal, proposed_areas, spec.min_visible):
                # A hue near the class's own; the bands of two classes just do not touch.
                hue = (label + rng.uniform(-0.4, 0.4)) / len(DEMO_CLASSES)
                canvas = _paint(rng, canvas, coverage, hue)
                owner, areas = proposal, proposed_areas
                labels.append(label)
                break
    boxes = np.array([_tight_box(owner == i) for i in range(len(labels))], dtype=np.int64)
    return DemoScene(_degrade(rng, canvas), owner, np.array(labels, dtype=np.int64), boxes)


def _random_shape(rng: np.random.Generator, spec: DemoSpec) -> tuple[int, Array]:
    """A class index and a (V, 2) float polygon in pixels, somewhere on the canvas."""
    label = int(rng.integers(len(DEMO_CLASSES)))
    unit = _unit_polygon(DEMO_CLASSES[label])
    # Uniform in the logarithm, as the anchors' scales are.
    side = spec.size * spec.min_side * (spec.max_side / spec.min_side) ** rng.random()
    aspect = rng.uniform(0.55, 1.0)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    center = rng.uniform(0.1, 0.9, size=2) * spec.size
    scaled = unit * (side / 2.0) * np.array([1.0, aspect])
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return label, scaled @ rotation + center


def _unit_polygon(name: str) -> Array:
    """The (V, 2) outline of a class, within [-1, 1]."""
    if name == "rectangle":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64)
    if name == "cross":
        a = 0.36
        quarter = np.array([[a, -1], [a, -a], [1, -a]], dtype=np.float64)
        turns = [np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), k) for k in range(4)]
        return np.concatenate([quarter @ turn for turn in turns])
    vertices = {"ellipse": 64, "triangle": 3, "star": 10}[name]
    angles = np.arange(vertices) * (2.0 * np.pi / vertices)
    radius = np.where((np.arange(vertices) % 2 == 1) & (name == "star"), 0.45, 1.0)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None]


def _rasterize(polygon: Array, size: int) -> Array:
    """The (size, size) float32 share of each pixel that the (V, 2) polygon covers."""
    fine = np.zeros((size * _SUPERSAMPLE, size * _SUPERSAMPLE), dtype=np.float32)
    # fillPoly fills from vertex to vertex inclusively: -0.5 puts the corner on a cell's centre.
    vertices = np.rint(polygon * _SUPERSAMPLE - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [vertices], 1.0)
    return np.asarray(cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA))


def _polygon_area(polygon: Array) -> float:
    """Area of a simple (V, 2) polygon, by the shoelace formula."""
    x, y = polygon[:, 0], polygon[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2.0)


def _all_visible(owner: Array, areas: list[float], min_visible: float) -> bool:
    """Whether each object shows at least ``min_visible`` of its area, border included."""
    seen = np.bincount(owner[owner >= 0], minlength=len(areas))
    return bool(np.all(seen >= min_visible * np.array(areas)))


def _tight_box(mask: Array) -> tuple[int, int, int, int]:
    """XYXY pixel-edge bounds of a (H, W) boolean mask with at least one pixel."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _color(
    hue: float,
    rng: np.random.Generator,
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> Array:
    """A (3,) float32 BGR colour of this hue, saturation and value within the given ranges."""
    rgb = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb[::-1], dtype=np.float32) * 255.0


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """A (size, size) float32 field in [-1, 1] that varies over ``size / cells`` pixels."""
    coarse = rng.uniform(-1.0, 1.0, size=(cells, cells)).astype(np.float32)
    field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(np.asarray(field), -1.0, 1.0)


def _stripes(rng: np.random.Generator, size: int, period: tuple[float, float]) -> Array:
    """A (size, size) float32 sine grating in [-1, 1], of any direction and phase."""
    angle, phase = rng.uniform(0.0, 2.0 * np.pi, size=2)
    frequency = 2.0 * np.pi / rng.uniform(*period)
    y, x = np.mgrid[:size, :size]
    grating = np.sin((x * np.cos(angle) + y * np.sin(angle)) * frequency + phase)
    return grating.astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> Array:
    """A (size, size, 3) float32 BGR canvas: two pale colours blended by a smooth field."""
    first = _color(rng.random(), rng, (0.05, 0.30), (0.55, 0.95))
    second = _color(rng.random(), rng, (0.05, 0.30), (0.55, 0.95))
    blend = (_smooth_noise(rng, size, 4)[..., None] + 1.0) / 2.0
    canvas = first * blend + second * (1.0 - blend)
    return canvas + 6.0 * _stripes(rng, size, (size / 16, size / 3))[..., None]


def _texture(rng: np.random.Generator, size: int) -> Array:
    """A (size, size) float32 pattern in [-1, 1]: plain, striped, chequered or mottled."""
    kind = int(rng.integers(4))
    if kind == 0:
        return np.zeros((size, size), dtype=np.float32)
    if kind == 1:
        return _stripes(rng, size, (5.0, 12.0))
    if kind == 2:
        period = (7.0, 14.0)
        return np.sign(_stripes(rng, size, period) * _stripes(rng, size, period))
    return _smooth_noise(rng, size, size // 6)


def _paint(rng: np.random.Generator, canvas: Array, coverage: Array, hue: float) -> Array:
    """Lays one shape of (H, W) coverage and its shadow on the (H, W, 3) canvas."""
    size = canvas.shape[0]
    offset = rng.uniform(1.0, 3.0, size=2)
    shift = np.array([[1.0, 0.0, offset[0]], [0.0, 1.0, offset[1]]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(coverage, shift, (size, size)), (0, 0), 2.0)
    canvas = canvas * (1.0 - 0.35 * np.asarray(shadow)[..., None])
    fill = _color(hue, rng, (0.45, 0.95), (0.35, 0.95))
    texture = _texture(rng, size) * rng.uniform(10.0, 32.0)
    light = _smooth_noise(rng, size, 3) * 18.0
    surface = fill + (texture + light)[..., None]
    alpha = coverage[..., None]
    return np.asarray(surface * alpha + canvas * (1.0 - alpha))


def _degrade(rng: np.random.Generator, canvas: Array) -> Array:
    """Blurs a float canvas, adds sensor noise and rounds to uint8."""
    blurred = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.2))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(3.0, 9.0)
    return np.clip(np.rint(np.asarray(blurred) + noise), 0, 255).astype(np.uint8)


def ensure_demo_datasets(root: str, spec: DemoSpec = DEMO_SPEC) -> Path:
    """Draws the demo set below ``root`` unless this very set is already there.

    The set is drawn in a temporary folder beside the final one and moved there whole, so an
    interrupted run leaves nothing half-finished to be found. Processes wait for each other.

    Args:
        root: the folder of all data sets; made if absent.
        spec: what to draw.

    Returns:
        The folder with ``train/``, ``val/`` and ``annotations/{train,val}.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(root) / _FOLDER
    # What must agree for a drawn set to be used again.
    stamp = {"spec": asdict(spec), "classes": list(DEMO_CLASSES), "source": _SOURCE}
    if _is_current(folder, stamp):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(folder)):
        # Another process may have drawn it while this one waited.
        if not _is_current(folder, stamp):
            logger.info(f"Drawing the demo set into {folder} ...")
            _publish(folder, spec, stamp)
    return folder


def _is_current(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether ``folder`` holds a complete set with this stamp."""
    try:
        return bool(json.loads((folder / _STAMP).read_text()) == stamp)
    except (OSError, ValueError):
        return False


def _publish(folder: Path, spec: DemoSpec, stamp: dict[str, Any]) -> None:
    """Draws into a temporary sibling and puts it in the place of ``folder``."""
    staging = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=folder.parent))
    try:
        drawn, outdated = staging / "new", staging / "old"
        drawn.mkdir()
        _write_split(drawn, "train", range(spec.num_train), spec)
        _write_split(drawn, "val", range(spec.num_train, spec.num_train + spec.num_val), spec)
        (drawn / _STAMP).write_text(json.dumps(stamp, indent=1))
        if folder.exists():
            # A folder cannot be replaced by a rename unless it is empty.
            os.replace(folder, outdated)
        os.replace(drawn, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_split(folder: Path, split: str, indices: range, spec: DemoSpec) -> None:
    """Writes the images of one split and its COCO JSON."""
    (folder / split).mkdir()
    (folder / "annotations").mkdir(exist_ok=True)
    images = []
    for index in indices:
        scene = draw_scene(index, spec)
        # PNG, not JPEG: the pixels are then the same whatever library reads them.
        name = f"{index:06d}.png"
        if not cv2.imwrite(str(folder / split / name), scene.image):
            raise OSError(f"cannot write {folder / split / name}")
        objects = []
        for row, (x1, y1, x2, y2) in enumerate(scene.boxes.tolist()):
            area = int(np.count_nonzero(scene.owner == row))
            box = [x1, y1, x2 - x1, y2 - y1]
            objects.append((int(scene.labels[row]), box, {"area": area}))
        images.append((name, spec.size, spec.size, objects))
    content = coco_content(DEMO_CLASSES, images)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def register_demo_datasets(root: str) -> None:
    """Registers ``iou_balanced_demo_train`` and ``iou_balanced_demo_val``.

    Nothing is drawn, read or written before one of them is loaded.

    Args:
        root: the folder of all data sets, usually ``$DETECTRON2_DATASETS`` or ``"datasets"``.
    """
    folder = Path(root) / _FOLDER
    for split in ("train", "val"):
        name = f"{_FOLDER}_{split}"
        paths = str(folder / "annotations" / f"{split}.json"), str(folder / split)
        DatasetCatalog.register(name, partial(_load, root, *paths, name))
        MetadataCatalog.get(name).set(
            json_file=paths[0],
            image_root=paths[1],
            evaluator_type="coco",
            thing_classes=list(DEMO_CLASSES),
        )


def _load(root: str, json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    ensure_demo_datasets(root)
    return list(load_coco_json(json_file, image_root, name))
