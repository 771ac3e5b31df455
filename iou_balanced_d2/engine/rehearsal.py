"""A rehearsal of a run before its launch: every part is built once and sees one blank image.

What raises here would raise in the run. Which key is to blame is found by trial: the user's
settings are undone one by one until the rehearsal succeeds.
"""

import contextlib
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..data.loading import build_mapper
from ..data.resumable_loader import ResumableLoader, seeded
from ..errors import UserError
from ..modeling import DenseDetectorWithTTA, interface_of
from .checks import check_name
from .config import flatten, settings
from .trainer import Trainer

_SECONDS = 30  # a model that takes longer to build has a layer count that is a mistake
_SIZE = 128  # pixels; the last level of RetinaNet's pyramid has one place
_LONG_VALUE = 80  # characters
_RANDOM_INIT = {name for name in vars(nn.init) if name.endswith(("uniform_", "normal_"))}
_HEAVY = (F.conv2d, F.conv_transpose2d, F.linear)


def check_build(
    cfg: CfgNode, config_file: str, opts: Sequence[str], *, training: bool, world_size: int = 1
) -> None:
    """Rehearse the run, and if that fails find the key whose value is the cause."""
    rehearsal = partial(rehearse, training=training, world_size=world_size)
    error = _error_of(rehearsal, cfg)
    if error is None:
        return
    reason, flat, changed = _reason(error), flatten(cfg), ""
    for key, value in settings(config_file, opts):
        trial = cfg.clone()
        trial.defrost()
        trial.merge_from_list([key, value])
        other = _error_of(rehearsal, trial)
        message = reason if key in reason else f"{key} {flat[key]!r} can't be used: {reason}"
        if other is None:
            works = f"; {value!r} works" if len(repr(value)) < _LONG_VALUE else ""
            raise UserError(message + works) from error
        if not changed and _reason(other) != reason:
            changed = message  # perhaps one mistake of several
    raise UserError(changed or f"the config can't be used: {reason}") from error


def _error_of(rehearsal: Callable[[CfgNode], None], cfg: CfgNode) -> Exception | None:
    try:
        rehearsal(cfg)
    except Exception as error:
        return error
    return None


def _reason(error: Exception) -> str:
    """The first line of an error's message, and its type where the message alone says little."""
    text = (str(error).strip().splitlines() or [""])[0]
    plain = isinstance(error, UserError | ValueError | RuntimeError) and text
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")


def rehearse(cfg: CfgNode, *, training: bool, world_size: int = 1) -> None:
    """Build every part of a run as the run does, and let the detector see a blank image.

    Nothing is computed that takes long: see :class:`_Skeleton`. Random states stay as they are.
    Only dense detectors see the image, as others may need masks or more.
    """
    cfg = Trainer.auto_scale_workers(cfg, world_size).clone()
    cfg.defrost()
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type != "cuda":  # else each process checks its own
        torch.zeros(1, device=device).item()
    cfg.MODEL.DEVICE = "cpu"
    files, sets = cfg.DATASETS.PROPOSAL_FILES_TEST, cfg.DATASETS.TEST
    if cfg.MODEL.LOAD_PROPOSALS and len(files) != len(sets):
        raise ValueError("DATASETS.PROPOSAL_FILES_TEST needs a file for each of DATASETS.TEST")
    for _task, _metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        float(expected - tolerance)
    with _quiet(), _time_limit(), seeded(0):
        if training:
            seed_all_rng(max(cfg.SEED, 0) + world_size)
        with _Skeleton():
            model = build_model(cfg)
            for is_train in (True, False) if training else (False,):
                _see_blank_image(cfg, model, is_train=is_train, on_gpu=device.type != "cpu")
        if training:
            _build_training(cfg, model)


def _build_training(cfg: CfgNode, model: nn.Module) -> None:
    """The optimizer, the schedule up to its end, the loader and the period of the checkpoints."""
    optimizer = Trainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        number = torch.zeros(1)
        for key in ("lr", "weight_decay"):  # as the optimizer takes them
            number.add(number, alpha=group[key])
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    for scheduler.last_epoch in (0, cfg.SOLVER.MAX_ITER // 2, cfg.SOLVER.MAX_ITER):
        scheduler.get_lr()
    blank = {"width": 1, "height": 1, "annotations": [{"category_id": 0}]}
    ResumableLoader(cfg, [blank] * 1000, mapper=len).build()
    1 % cfg.SOLVER.CHECKPOINT_PERIOD


def _see_blank_image(cfg: CfgNode, model: nn.Module, *, is_train: bool, on_gpu: bool) -> None:
    """Augment a blank image, and compute the losses or detect in it."""
    mapper = build_mapper(cfg, is_train=is_train)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        image = mapper(_blank_record(file))["image"]
    if not isinstance(model, DenseDetector):
        return
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if interface_of(detector).build_augmentation(cfg, is_train) is None:
        image = image.new_zeros(image.shape[0], _SIZE, _SIZE)
    height, width = image.shape[-2:]
    truth = Instances((height, width), gt_boxes=Boxes([[0, 0, width / 2, height / 2]]))
    truth.gt_classes = torch.zeros(1, dtype=torch.int64)
    inputs = {"image": image, "instances": truth, "height": height, "width": width}
    model.train(is_train)
    losses: dict[str, Tensor] | None = None
    with torch.no_grad():
        # Some layers have no version for the CPU: the run itself shows whether they work.
        with contextlib.suppress(*[NotImplementedError] if on_gpu else []):
            losses = model([inputs, inputs])  # batch normalisation takes two
        if losses and is_train and (metric := cfg.TEST.BEST_METRIC).startswith("validation/"):
            check_name(metric, [f"validation/{name}" for name in (*losses, "total_loss")])
        tta = cfg.TEST.AUG.ENABLED and not is_train
        if tta and not (versions := DenseDetectorWithTTA(cfg, model).tta_mapper(inputs)):
            raise ValueError("test-time augmentation without any version of the image")
        for version in versions if tta else ():
            model.preprocess_image([version])  # SSD takes one size alone


def _blank_record(file: IO[bytes]) -> dict[str, Any]:
    """Write a blank image; returns a dataset dict in detectron2's form."""
    width, height = 128, 96
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    file.flush()
    box = {"bbox": [16, 16, 64, 64], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {
        "file_name": file.name,
        "image_id": 0,
        "width": width,
        "height": height,
        "annotations": [{**box, "iscrowd": 0}],
    }


class _Skeleton(TorchFunctionMode):
    """Weights are left as memory that is never touched, and layers that use them give zeros."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM_INIT:
            return args[0] if args else kwargs["tensor"]
        if func in _HEAVY:
            shape = func(*map(_to_meta, args), **{k: _to_meta(v) for k, v in kwargs.items()})
            return torch.zeros_like(shape, device="cpu")
        return func(*args, **kwargs)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: the run itself gives them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise an error after some time, where Python lets us: signals reach the main thread only.

    Again each second, as Python or a library may ignore an error, e.g. in a destructor.
    """

    def stop(*_: object) -> None:
        raise RuntimeError(f"building the model takes more than {_SECONDS} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
