r"""Draw what a trained detector finds in pictures of one's own.

python demo/demo.py --config-file my.yaml --input photos/ more/*.jpg --output found \
    --opts MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import glob
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.engine.defaults import DefaultPredictor
from detectron2.structures import Instances
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..analysis.boxes import draw_boxes
from ..data import known_classes, register_datasets_of
from ..data.images import fault_of
from ..data.inspection import PROBLEMS
from ..data.loading import build_mapper
from ..engine import load_config
from ..engine.checkpoint import RobustCheckpointer
from ..engine.checks import check_weights
from ..engine.config import choose_device
from ..engine.rehearsal import check_build
from ..errors import UserError
from ..files import make_folder
from .visualize_results import MAX_SIDE, free_name, picture_scale

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def pictures_of(words: Sequence[str], output: Path) -> Iterator[str]:
    """The files that paths, folders and patterns stand for; a path that is not there is kept.

    Folders are read with their subfolders, but not what was drawn before.
    """
    for word in words:
        if os.path.isdir(word):
            drawn = output.resolve() if Path(word).resolve() in output.resolve().parents else None
            files = sorted(
                str(file)
                for file in Path(word).rglob("*")
                if file.suffix.lower() in SUFFIXES and drawn not in file.resolve().parents
            )
            if not files:
                raise UserError(f"--input {word!r}: no pictures in this folder")
            yield from files
        elif os.path.exists(word):
            yield word
        else:
            yield from sorted(glob.glob(word, recursive=True)) or [word]


def read(file: str, longest: float) -> np.ndarray:
    """An image (H, W, 3) uint8 BGR; ValueError says why it is skipped, as its shape ``longest``."""
    try:
        with Image.open(file) as opened:
            fault = fault_of(opened)
        image = read_image(file, "BGR")
    except Exception as error:  # PIL raises SyntaxError and others on broken files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        raise ValueError(f"skipped, can't be read: {reason or type(error).__name__}") from error
    if max(image.shape[:2]) > longest * min(image.shape[:2]):
        fault = "strip"
    if fault:
        raise ValueError(f"skipped: {PROBLEMS[fault]}")
    return image


def draw(image: np.ndarray, found: Instances, names: Sequence[str]) -> np.ndarray:
    """Draw detections on (h, w, 3) uint8 BGR; small images are enlarged, huge ones reduced."""
    classes = found.pred_classes.tolist()
    labels = [
        f"{names[k] if names else k} {score:.0%}"
        for k, score in zip(classes, found.scores.tolist(), strict=True)
    ]
    scale = picture_scale(image)
    boxes = found.pred_boxes.tensor.numpy()
    return draw_boxes(image[:, :, ::-1], boxes, classes, labels, scale)[:, :, ::-1]


def summary(num_boxes: int, best_score: float, threshold: float) -> str:
    """How many boxes there were, and what to do if there were none."""
    text = f"{num_boxes} boxes of score {threshold:g} or more"
    if num_boxes:
        return text
    if not best_score:
        return f"{text}, nor of any other: does the model fit the pictures?"
    return f"{text}: the best score is {best_score:.2f}, see --confidence-threshold"


def load_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Build the model and load its weights."""
    without = cfg.clone()
    without.MODEL.WEIGHTS = ""  # detectron2's predictor would run code that a file holds
    predictor = DefaultPredictor(without)
    RobustCheckpointer(predictor.model, strict=True).load(cfg.MODEL.WEIGHTS)
    # As in evaluation; SSD's resizing is not detectron2's.
    (predictor.aug,) = build_mapper(cfg, is_train=False).augmentations.augs
    return predictor


def targets_of(files: Sequence[str], output: Path) -> list[Path]:
    """Where each picture is drawn to; refuses to draw over one that is an input."""
    written: set[str] = set()
    targets = [output / free_name(Path(file), written) for file in files]
    # By inode and device, as links lead to one file by several paths.
    inputs = {os.stat(file)[1:3]: file for file in files if os.path.exists(file)}
    for target in filter(os.path.exists, targets):
        if replaced := inputs.get(os.stat(target)[1:3]):
            raise UserError(f"{replaced} would be overwritten: give another folder as --output")
    return targets


def checked_config(args: argparse.Namespace) -> CfgNode:
    """The config, once its detector can be built and has weights."""
    cfg = load_config(args.config_file, args.opts)
    choose_device(cfg, args.opts)
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise UserError(
            f"INPUT.FORMAT {cfg.INPUT.FORMAT!r}: detectron2's predictor takes BGR and RGB only"
        )
    check_build(cfg, args.config_file, args.opts, training=False)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no detector: give --opts MODEL.WEIGHTS FILE at the end of the command")
    check_weights(cfg, resume=False, eval_only=True)
    return cfg


def run(args: argparse.Namespace) -> int:
    """Draw everything; 1 if files could not be read."""
    cfg = checked_config(args)
    output = Path(args.output)
    make_folder(output)
    # Warned of by detectron2's anchor generator; the user can't change it.
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    predict = load_predictor(cfg)
    register_datasets_of(cfg)
    names = known_classes(cfg)
    files = list(pictures_of(args.input, output))
    targets = targets_of(files, output)
    failed, num_boxes, best_score = 0, 0, 0.0
    for file, target in zip(tqdm(files, disable=len(files) < 2), targets, strict=True):
        try:
            image = read(file, cfg.INPUT.MAX_SIZE_TEST)
        except ValueError as error:
            tqdm.write(f"{file}: {error}", file=sys.stderr)
            failed += 1
            continue
        if max(image.shape[:2]) > MAX_SIDE:
            tqdm.write(f"{file}: drawn with a side of {MAX_SIDE} pixels", file=sys.stderr)
        found = predict(image)["instances"].to("cpu")
        best_score = max([best_score, *found.scores.tolist()])
        found = found[found.scores >= args.confidence_threshold]
        num_boxes += len(found)
        if not cv2.imwrite(str(target), draw(image, found, names)):
            raise UserError(f"{target} can't be written")
    if num_drawn := len(files) - failed:
        print(f"{num_drawn} pictures: {output}")
        print(summary(num_boxes, best_score, args.confidence_threshold))
    if failed:
        print(f"demo.py: {failed} file(s) could not be read, see above", file=sys.stderr)
    return 1 if failed else 0
