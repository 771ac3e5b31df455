"""Trained detectors as TorchScript or ONNX files, by detectron2's tracing.

The exported graph is the plain detector's: one image in; boxes, scores and classes out.
"""

import contextlib
import copy
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from ..errors import UserError
from .iou_balanced_loss import IoUBalancedLoss

# Outputs of the file, in this order.
OUTPUT_NAMES = ("boxes", "scores", "classes")
# The oldest opset that has all operators of the graphs.
ONNX_OPSET = 16

Detections = tuple[Tensor, Tensor, Tensor]


def plain_detector(model: nn.Module) -> DenseDetector:
    """A copy of a detector that can only detect: in evaluation mode and without its losses.

    Args:
        model: RetinaNet, FCOS, SSD or another dense detector on the CPU.

    Returns:
        the copy.

    Raises:
        UserError: if the detector is of another kind.
    """
    if not isinstance(model, DenseDetector):
        raise UserError(
            f"{type(model).__name__} can't be exported: only dense detectors such as RetinaNet, "
            "FCOS and SSD can (for others there is detectron2's tools/deploy/export_model.py)"
        )
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, IoUBalancedLoss):
                delattr(module, name)
    return plain


def detect(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Detections:
    """Compute with the model itself what the exported file computes.

    Args:
        model: the detector, in evaluation mode.
        inputs: one image, {"image": (3, H, W) float32, of the values 0 to 255 and in the order of
            channels of INPUT.FORMAT}.

    Returns:
        boxes (D, 4) float32 XYXY in pixels of that image, scores (D,) float32, best first, and
        classes (D,) int64.
    """
    found = model(inputs)[0]["instances"]
    return found.pred_boxes.tensor, found.scores, found.pred_classes


def export_torchscript(model: nn.Module, image: Tensor, path: str) -> None:
    """Write a TorchScript file, a function of the image as :func:`detect`.

    Args:
        model: from :func:`plain_detector`.
        image: (3, H, W) float32, an example of the size the detector is to be used at; others work
            as well.
        path: of the file.
    """
    with _tracing(model, image) as adapter:
        torch.jit.trace(adapter, adapter.flattened_inputs).save(path)


def export_onnx(model: nn.Module, image: Tensor, path: str) -> None:
    """Write an ONNX file with the input "image" and the outputs "boxes", "scores" and "classes".

    Args:
        model: from :func:`plain_detector`.
        image: as for :func:`export_torchscript`.
        path: of the file.

    Raises:
        UserError: if the package onnx is missing.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--format onnx needs the package onnx: pip install onnx")
    options: dict[str, Any] = {}
    # The newer exporter, by torch.export, can't follow detectron2's Instances. Older versions of
    # PyTorch have only this one.
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    with _tracing(model, image) as adapter:
        torch.onnx.export(
            adapter,
            adapter.flattened_inputs,
            path,
            input_names=["image"],
            output_names=list(OUTPUT_NAMES),
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in OUTPUT_NAMES},
            },
            opset_version=ONNX_OPSET,
            **options,
        )


@contextlib.contextmanager
def _tracing(model: nn.Module, image: Tensor) -> Iterator[TracingAdapter]:
    """The detector as a function of tensors, for as long as it is traced.

    Hides the tracer's warnings of detectron2's assertions and of its own deprecation.
    """
    # The exporter sets all modules to the mode of the outermost one.
    adapter = TracingAdapter(model, [{"image": image}], detect).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield adapter
