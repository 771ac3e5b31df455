r"""Write a trained detector as a TorchScript or ONNX file, and check the file against it.

python tools/export_model.py --config-file my.yaml --format onnx --output exported \
    MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import AugInput
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import Tensor

from ..data import known_classes, register_datasets_of
from ..data.loading import build_mapper
from ..engine import load_config
from ..engine.checkpoint import RobustCheckpointer
from ..engine.checks import check_weights
from ..engine.rehearsal import check_build
from ..errors import UserError
from ..files import make_folder
from ..modeling import interface_of
from ..modeling.export import (
    OUTPUT_NAMES,
    Detections,
    detect,
    export_onnx,
    export_torchscript,
    plain_detector,
)

FORMATS = {"torchscript": ("model.ts", export_torchscript), "onnx": ("model.onnx", export_onnx)}
# Largest difference of boxes (pixels) and scores between the file and the detector that is only
# rounding.
TOLERANCE = 1e-2


def sample_image(cfg: CfgNode, file: str | None) -> Tensor:
    """An image, (C, H, W) float32, resized as in evaluation."""
    if file is None:
        shape = 480, 640, len(cfg.MODEL.PIXEL_MEAN)
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    else:
        try:
            image = read_image(file, cfg.INPUT.FORMAT)
        except OSError as error:
            reason = error.strerror or "not an image"
            raise UserError(f"--image {file!r} can't be read: {reason}") from error
    augmented = AugInput(image)
    build_mapper(cfg, is_train=False).augmentations(augmented)
    return torch.from_numpy(augmented.image.transpose(2, 0, 1).astype("float32"))


def run_file(path: str) -> Callable[[Tensor], Detections] | None:
    """The exported file as a function; None if there is nothing to run it with."""
    if path.endswith(".ts"):
        return torch.jit.load(path)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def detect_in(image: Tensor) -> Detections:
        boxes, scores, classes = session.run(None, {"image": image.numpy()})
        return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(classes)

    return detect_in


def check(path: str, expected: Detections, image: Tensor) -> str:
    """Compare the file with the detector; returns what came out, as words."""
    function = run_file(path)
    if function is None:
        return "not checked: that takes the package onnxruntime"
    found = function(image)
    if len(found[0]) != len(expected[0]):
        return f"WARNING: {len(found[0])} detections, where the detector has {len(expected[0])}"
    pairs = zip(OUTPUT_NAMES, found, expected, strict=True)
    largest = {name: (a - b).abs().max().item() if len(a) else 0.0 for name, a, b in pairs}
    words = ", ".join(f"{name} {value:.1g}" for name, value in largest.items())
    verdict = "checked" if max(largest.values()) <= TOLERANCE else "WARNING: not equal"
    return f"{verdict}: {len(found[0])} detections, largest difference: {words}"


def describe(cfg: CfgNode, image: Tensor) -> dict[str, object]:
    """What a user of the file has to know; ``image`` is one, resized as in evaluation."""
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    sizes = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST]
    is_fixed = interface_of(detector).build_augmentation(cfg, is_train=False) is not None
    if is_fixed:
        sizes = sorted(image.shape[1:])
    return {
        "input": f"image: ({len(cfg.MODEL.PIXEL_MEAN)}, H, W) float32, values 0 to 255, one image",
        "channels": cfg.INPUT.FORMAT,
        "min_size": sizes[0],
        "max_size": sizes[1],
        "keep_aspect_ratio": not is_fixed,
        "outputs": "boxes (D, 4) XYXY in pixels of the input, scores (D,), classes (D,)",
        "class_names": known_classes(cfg),
    }


def run(args: argparse.Namespace) -> None:
    """Write the file and model.json, and check the file."""
    # From detectron2's anchor generator and about TorchScript's future; the user can't change them.
    for message in ("torch.meshgrid", ".*torch.jit.load"):
        warnings.filterwarnings("ignore", message=message)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = "cpu"
    if not cfg.MODEL.WEIGHTS:
        raise UserError("nothing to export: give MODEL.WEIGHTS FILE at the end of the command")
    check_weights(cfg, resume=False, eval_only=True)
    register_datasets_of(cfg)
    check_build(cfg, args.config_file, args.opts, training=False)
    make_folder(args.output)
    image = sample_image(cfg, args.image)
    model = build_model(cfg)
    plain = plain_detector(model)
    RobustCheckpointer(plain, strict=True).load(cfg.MODEL.WEIGHTS)
    name, write = FORMATS[args.format]
    path = os.path.join(args.output, name)
    write(plain, image, path)
    description = describe(cfg, image)
    if not description["class_names"]:
        print("export_model.py: warning: model.json has no class names, as no data set of the "
              "config that can be read here has as many classes", file=sys.stderr)  # fmt: skip
    with open(os.path.join(args.output, "model.json"), "w", encoding="utf-8") as f:
        json.dump(description, f, indent=2)
    with torch.no_grad():
        expected = detect(plain, [{"image": image}])
    print(f"{path} written; {check(path, expected, image)}")
