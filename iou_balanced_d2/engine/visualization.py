"""Looking at a training: pictures of the current batch and histograms, for TensorBoard.

detectron2's VIS_PERIOD has no effect on its dense detectors; with these hooks it has.
"""

import contextlib
import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import HookBase, TrainerBase
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.visualizer import Visualizer
from numpy.typing import NDArray
from torch import Tensor, nn

from ..modeling import IoUBalancedLoss

# Boxes drawn beyond as many as there are objects: what is next in rank.
_MORE_BOXES = 3
# Small images are enlarged to about this width, so that labels can be read.
_MIN_WIDTH = 640
_PREDICTED, _TRUE = "#E69F00", "#56B4E9"  # which colour-blind people can tell apart
PICTURE_NAME = "Left: predictions; right: ground truth"


class TrainingPictures(HookBase):
    """Every so many iterations draws what the model finds in an image of the current batch.

    The batch is caught on its way into the model. The training is bit for bit the one without
    this hook: normalisation statistics and random states are left as they are.
    """

    trainer: TrainerBase

    def __init__(
        self, period: int, *, class_names: list[str] | None = None, image_format: str = "BGR"
    ):
        """Set what is drawn.

        Args:
            period: iterations between pictures; the first is drawn at iteration 0.
            class_names: for labels; None for the classes' numbers.
            image_format: the order of the batches' channels, INPUT.FORMAT.
        """
        self._period = period
        self._class_names = class_names
        self._image_format = image_format
        self._handle: Any = None
        self._input: dict[str, Any] | None = None

    def before_step(self) -> None:
        """Wait for the batch."""
        if comm.is_main_process() and self.trainer.iter % self._period == 0:
            self._handle = self.trainer.model.register_forward_pre_hook(self._catch)

    def after_step(self) -> None:
        """Draw the batch's first image."""
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        if self._input is None:  # the trainer skipped the model in this step
            return
        caught, self._input = self._input, None
        with inference_without_trace(self.trainer.model) as model:
            # Without "height" and "width" boxes come in the pixels of the image as it is here.
            found = model([{"image": caught["image"]}])[0]["instances"].to("cpu")
            picture = self._draw(caught, found)
        get_event_storage().put_image(PICTURE_NAME, picture.transpose(2, 0, 1))
        # Matplotlib's figures are cycles that hold megabytes; full collections are rare.
        gc.collect()

    def _catch(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0][0]

    def _draw(self, caught: dict[str, Any], found: Instances) -> NDArray[np.uint8]:
        """Both pictures side by side, (H, 2 W, 3) uint8 RGB; of a small image enlarged."""
        image = convert_image_to_rgb(caught["image"].permute(1, 2, 0), self._image_format)
        image = np.ascontiguousarray(image, dtype=np.uint8)
        truth = caught["instances"].to("cpu")
        most = len(truth) + _MORE_BOXES
        best = found[found.scores.argsort(descending=True)[:most]]
        labels = [
            f"{self._name(label)} {score:.2f}"
            for label, score in zip(best.pred_classes.tolist(), best.scores.tolist(), strict=True)
        ]
        left = _boxes_on(image, best.pred_boxes.tensor, labels, _PREDICTED)
        names = [self._name(label) for label in truth.gt_classes.tolist()]
        right = _boxes_on(image, truth.gt_boxes.tensor, names, _TRUE)
        return np.concatenate([left, right], axis=1)

    def _name(self, label: int) -> str:
        return self._class_names[label] if self._class_names else str(label)


def _boxes_on(
    image: NDArray[np.uint8], boxes: Tensor, labels: list[str], color: str
) -> NDArray[np.uint8]:
    visualizer = Visualizer(image, scale=max(1.0, _MIN_WIDTH / image.shape[1]))
    drawn = visualizer.overlay_instances(
        boxes=boxes.detach().numpy(), labels=labels, assigned_colors=[color] * len(labels)
    )
    picture: NDArray[np.uint8] = drawn.get_image()
    return picture


@contextlib.contextmanager
def inference_without_trace(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model in training predict; afterwards modes and random states are what they were.

    Args:
        model: the detector, wrapped in DDP or not.

    Yields:
        the detector itself, in inference mode and without gradients.
    """
    model = getattr(model, "module", model)
    training = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()  # detectron2 draws colours at random
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield model
    finally:
        for module, mode in training:
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])


class LossHistograms(HookBase):
    """Every so many iterations writes histograms of the positives' IoU and weights.

    They are named ``iou_balanced/pos_iou``, ``iou_balanced/cls_weight`` (eq. 2) and
    ``iou_balanced/loc_weight`` (eq. 4), and are those of the main process.
    """

    trainer: TrainerBase

    def __init__(self, period: int):
        """Set how often.

        Args:
            period: iterations between histograms; the first are of iteration 0.
        """
        self._period = period

    def before_step(self) -> None:
        """Listen to the losses."""
        if comm.is_main_process() and self.trainer.iter % self._period == 0:
            self._set_observer(_put_histograms)

    def after_step(self) -> None:
        """Stop listening."""
        self._set_observer(None)

    def _set_observer(self, observer: Any) -> None:
        for module in self.trainer.model.modules():
            if isinstance(module, IoUBalancedLoss):
                module.observer = observer


def _put_histograms(tensors: dict[str, Tensor]) -> None:
    """Put (P,) tensors into the storage by name; those with nothing to count are left out."""
    storage = get_event_storage()
    for name, values in tensors.items():
        values = values.detach().float().cpu()
        if len(values) and bool(values.isfinite().all()):
            storage.put_histogram(f"iou_balanced/{name}", values, bins=50)


def visualization_hooks(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """The hooks of VIS_PERIOD.

    Args:
        cfg: the full config.
        model: the detector, wrapped in DDP or not. Two-stage detectors draw pictures by themselves.

    Returns:
        none with VIS_PERIOD 0.
    """
    if cfg.VIS_PERIOD <= 0:
        return []
    chosen: list[HookBase] = [LossHistograms(cfg.VIS_PERIOD)]
    if not isinstance(getattr(model, "module", model), GeneralizedRCNN | ProposalNetwork):
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
        chosen.append(
            TrainingPictures(cfg.VIS_PERIOD, class_names=names, image_format=cfg.INPUT.FORMAT)
        )
    return chosen
