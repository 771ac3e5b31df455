"""What VIS_PERIOD sends to TensorBoard: pictures of the batch, and histograms of the weights."""

import gc
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.evaluator import inference_context
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..modeling import IoUBalancedLoss


class VisualizeTraining(HookBase):
    """Calls ``visualize_training`` of detectron2's dense detectors; detectron2 never does.

    The hook does not change the weights, as each step has its own seed.

    Args:
        cfg: the full config; see VIS_PERIOD.
        model: the detector, not wrapped in DDP.
    """

    trainer: Any

    def __init__(self, cfg: CfgNode, model: DenseDetector):
        self._period = cfg.VIS_PERIOD
        self._model: Any = model
        if not hasattr(model, "input_format"):  # detectron2's FCOS has none, but it is needed
            self._model.input_format = cfg.INPUT.FORMAT

    def after_step(self) -> None:
        """Draw the first image of the step's batch."""
        if self.trainer.iter % self._period:
            return
        inputs = self.trainer._trainer.batch[:1]
        with inference_context(self._model), torch.no_grad():
            # Without "height" and "width", so that boxes are in pixels of this image.
            found = self._model([{"image": inputs[0]["image"]}])[0]["instances"]
        self._model.visualize_training(inputs, [found.to("cpu")])
        # Matplotlib's figures are cycles that hold megabytes; full collections are rare.
        gc.collect()


class LossHistograms(HookBase):
    """Histograms of the main process's positives: IoU and weights.

    Named ``iou_balanced/pos_iou``, ``iou_balanced/cls_weight`` (eq. 2) and
    ``iou_balanced/loc_weight`` (eq. 4).

    Args:
        period: iterations between histograms; the first are of iteration 0.
        model: the detector, wrapped in DDP or not.
    """

    trainer: Any

    def __init__(self, period: int, model: nn.Module):
        self._period = period
        self._losses = [m for m in model.modules() if isinstance(m, IoUBalancedLoss)]

    def before_step(self) -> None:
        """Observe the losses of this step."""
        if self.trainer.iter % self._period == 0:
            for loss in self._losses:
                loss.observer = _put_histograms

    def after_step(self) -> None:
        """Stop observing."""
        for loss in self._losses:
            loss.observer = None


def _put_histograms(tensors: dict[str, Tensor]) -> None:
    """Put (P,) tensors into the storage by name; empty and non-finite ones are left out."""
    storage = get_event_storage()
    for name, values in tensors.items():
        values = values.detach().float().cpu()
        if len(values) and bool(values.isfinite().all()):
            storage.put_histogram(f"iou_balanced/{name}", values, bins=50)


def visualization_hooks(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """The main process's hooks of VIS_PERIOD; two-stage detectors draw pictures themselves."""
    if cfg.VIS_PERIOD <= 0 or not comm.is_main_process():
        return []
    chosen: list[HookBase] = [LossHistograms(cfg.VIS_PERIOD, model)]
    model = getattr(model, "module", model)
    if isinstance(model, DenseDetector):
        chosen.append(VisualizeTraining(cfg, model))
    return chosen
