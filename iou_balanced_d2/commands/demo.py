r"""Draw what a trained detector finds in pictures or a video of one's own.

python demo/demo.py --config-file my.yaml --input photos/ more/*.jpg --output found \
    --opts MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import contextlib
import glob
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine.defaults import DefaultPredictor
from detectron2.structures import Instances
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..analysis.boxes import draw_boxes
from ..data import prepare_dataset, register_datasets_of
from ..data.coco_format import class_names, read_coco_json
from ..data.images import fault_of
from ..data.inspection import PROBLEMS
from ..engine import load_config
from ..engine.checkpoint import RobustCheckpointer
from ..engine.checks import check_weights
from ..engine.config import choose_device
from ..engine.rehearsal import check_build
from ..errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
# Small pictures are enlarged to about this width, so that thin lines and labels can be read.
MIN_WIDTH = 640
# No picture is drawn larger: drawing takes some 50 bytes a pixel.
MAX_SIDE = 6000


class Detector:
    """A model and what is needed to show its detections."""

    def __init__(self, cfg: CfgNode, threshold: float):
        """Build the model and load its weights.

        Args:
            cfg: the full config.
            threshold: lowest score that counts.

        Raises:
            UserError: if the weights can't be read, or are not the whole model's.
        """
        without = cfg.clone()
        without.MODEL.WEIGHTS = ""  # detectron2's predictor would run code that a file holds
        self._predict = DefaultPredictor(without)
        RobustCheckpointer(self._predict.model, strict=True).load(cfg.MODEL.WEIGHTS)
        self._threshold = threshold
        self.longest = cfg.INPUT.MAX_SIZE_TEST  # times the shorter side; nothing is left of others
        self.metadata = classes_of(cfg)
        self.num_images, self.num_boxes, self.best_score = 0, 0, 0.0

    def __call__(self, image: np.ndarray) -> Instances:
        """Detect in (H, W, 3) uint8 BGR."""
        found = self._predict(image)["instances"].to("cpu")
        self.best_score = max([self.best_score, *found.scores.tolist()])
        found = found[found.scores >= self._threshold]
        self.num_images += 1
        self.num_boxes += len(found)
        return found

    def summary(self) -> str:
        """How many boxes there were, and what to do if there were none."""
        text = f"{self.num_boxes} boxes of score {self._threshold:g} or more"
        if self.num_boxes:
            return text
        if not self.best_score:
            return f"{text}, nor of any other: does the model fit the pictures?"
        return f"{text}: the best score is {self.best_score:.2f}, see --confidence-threshold"


def classes_of(cfg: CfgNode) -> Metadata:
    """Metadata with the names of the classes, if a data set of the config is there to give them."""
    register_datasets_of(cfg)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in DatasetCatalog:
            continue
        known = MetadataCatalog.get(name)
        with contextlib.suppress(UserError):  # its files are not here
            prepare_dataset(name)
        names = known.get("thing_classes")
        if not names and os.path.isfile(known.get("json_file", "")):
            names = class_names(read_coco_json(known.json_file))
        if names:
            return Metadata(thing_classes=list(names))
    return Metadata()


def pictures_of(words: Sequence[str], output: Path) -> Iterator[str]:
    """The files that paths, folders and patterns stand for; a path that is not there is kept.

    Folders are read with their subfolders, but not what was drawn before.

    Raises:
        UserError: if a folder has no pictures.
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


def draw_pictures(detector: Detector, files: Sequence[str], output: Path) -> int:
    """Draw each file into the folder; returns how many of them could not be read."""
    failed = 0
    written: set[str] = set()
    for file in tqdm(files, disable=len(files) < 2):
        try:
            with Image.open(file) as opened:
                fault = fault_of(opened)
            image = read_image(file, "BGR")
            if max(image.shape[:2]) > detector.longest * min(image.shape[:2]):
                fault = "strip"
        except Exception as error:  # PIL raises SyntaxError and others on broken files
            tqdm.write(f"{file}: skipped, can't be read: {reason(error)}", file=sys.stderr)
            failed += 1
            continue
        if fault:
            tqdm.write(f"{file}: skipped: {PROBLEMS[fault]}", file=sys.stderr)
            failed += 1
            continue
        if max(image.shape[:2]) > MAX_SIDE:
            tqdm.write(f"{file}: drawn with a side of {MAX_SIDE} pixels", file=sys.stderr)
        name = free_name(Path(file), written)
        keep_input(file, output / name)
        # Small ones are enlarged, huge ones reduced.
        scale = min(max(1.0, MIN_WIDTH / image.shape[1]), MAX_SIDE / max(image.shape[:2]))
        picture = draw(image, detector(image), detector.metadata, scale)
        write_picture(output / name, picture)
    return failed


def draw(image: np.ndarray, found: Instances, metadata: Metadata, scale: float) -> np.ndarray:
    """Draw detections on (h, w, 3) uint8 BGR; (scale * h, scale * w, 3) uint8 BGR."""
    classes, names = found.pred_classes.tolist(), metadata.get("thing_classes")
    labels = [
        f"{names[k] if names else k} {score:.0%}"
        for k, score in zip(classes, found.scores.tolist(), strict=True)
    ]
    boxes = found.pred_boxes.tensor.numpy()
    return draw_boxes(image[:, :, ::-1], boxes, classes, labels, scale)[:, :, ::-1]


def free_name(file: Path, written: set[str]) -> str:
    """A name for the output: the file's, numbered where folders have files of the same name."""
    suffix = file.suffix if file.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
    name, number = file.stem + suffix, 1
    while name in written:
        number += 1
        name = f"{file.stem}_{number}{suffix}"
    written.add(name)
    return name


def keep_input(file: str, target: Path) -> None:
    """Make sure that what is drawn does not replace what it is drawn on.

    Raises:
        UserError: if both are the same file.
    """
    if target.exists() and target.samefile(file):
        raise UserError(f"{file} would be overwritten: give another folder as --output")


def write_picture(file: Path, picture: np.ndarray) -> None:
    """Write (H, W, 3) uint8 BGR in the format that the file's ending names."""
    if not cv2.imwrite(str(file), picture):
        raise UserError(f"{file} can't be written")


def draw_video(detector: Detector, file: str, output: Path) -> int:
    """Draw a video's frames into one of the same name; returns 1 if it can't be read, else 0."""
    video = cv2.VideoCapture(file)
    try:
        ok, frame = video.read()
        if not ok:
            missing = "" if os.path.exists(file) else ": no such file"
            print(f"{file}: skipped, can't be read as a video{missing}", file=sys.stderr)
            return 1
        size = (frame.shape[1], frame.shape[0])
        writer, written = open_writer(file, output / Path(file).stem, video, size)
        with tqdm(total=max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None) as progress:
            while ok:
                writer.write(draw(frame, detector(frame), detector.metadata, scale=1))
                progress.update()
                ok, frame = video.read()
        writer.release()
    finally:
        video.release()
    print(f"Video: {written}")
    return 0


def open_writer(source: str, stem: Path, video: Any, size: tuple[int, int]) -> tuple[Any, Path]:
    """A writer of video frames (width, height): MP4, or AVI where OpenCV can't write that."""
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0
    for suffix, codec in ((".mp4", "mp4v"), (".avi", "MJPG")):
        file = stem.with_name(stem.name + suffix)
        keep_input(source, file)
        writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*codec), rate, size)
        if writer.isOpened():
            return writer, file
    raise UserError(f"{stem}.mp4 can't be written")


def reason(error: Exception) -> str:
    """Why a file can't be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def run(args: argparse.Namespace) -> int:
    """Draw everything; 1 if files could not be read."""
    cfg = load_config(args.config_file, args.opts)
    choose_device(cfg, args.opts)
    check_build(cfg, args.config_file, args.opts, training=False)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no detector: give --opts MODEL.WEIGHTS FILE at the end of the command")
    check_weights(cfg, resume=False, eval_only=True)
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output!r} can't be written: {error.strerror}") from error
    # Warned of by detectron2's anchor generator; the user can't change it.
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    detector = Detector(cfg, args.confidence_threshold)
    files = list(pictures_of(args.input, output))
    failed = draw_pictures(detector, files, output)
    if len(files) > failed:
        print(f"{len(files) - failed} pictures: {output}")
    if args.video_input:
        failed += draw_video(detector, args.video_input, output)
    if detector.num_images:
        print(detector.summary())
    if failed:
        print(f"demo.py: {failed} file(s) could not be read, see above", file=sys.stderr)
    return 1 if failed else 0
