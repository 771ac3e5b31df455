"""Checkpoints: written whole or not at all, and read by the main process for all others."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_atomically
from ..modeling import IoUBalancedLoss, interface_of
from .safe_load import BrokenCheckpoint, read_checkpoint

logger = logging.getLogger(__name__)

T = TypeVar("T")
# A parameter's name, its shape in the checkpoint, and its shape in the model.
Mismatch = tuple[str, Sequence[int], Sequence[int]]


def checkpoint_files(folder: str) -> list[str]:
    """The paths of a folder's checkpoints, the best to resume from first.

    That is the one that ``last_checkpoint`` names, then those before it. Numbers above it are left
    over from an older, longer training.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    numbered = sorted((n for n in names if re.fullmatch(r"model_\d{7,}\.pth", n)), reverse=True)
    tagged = ""
    with (
        contextlib.suppress(OSError),
        open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as f,
    ):
        tagged = f.read().strip()
    if re.fullmatch(r"model_\d{7,}\.pth", tagged):
        numbered = [name for name in numbered if name < tagged]
    return [os.path.join(folder, name) for name in ([tagged] if tagged else []) + numbered]


def from_main_process(function: Callable[[], T]) -> T:
    """Call a function in the main process; every process returns its result or raises its error.

    Both must be picklable.
    """
    if comm.get_world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if comm.is_main_process():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    # By gloo, as NCCL would need all of it on the GPU.
    dist.broadcast_object_list(outcome, src=0, group=comm._get_global_gloo_group())
    result: T = outcome[0]
    if outcome[1] is not None:
        raise outcome[1]
    return result


class RobustCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer that writes whole files, falls back, and runs no code of a file.

    The main process decides what is loaded, reads it and sends it to the others: hosts need no
    common file system.

    Args:
        model: the detector, wrapped in DDP or not.
        save_dir: OUTPUT_DIR.
        trust: read checkpoints that hold other objects than tensors; that can run code.
        others: what else is saved and resumed, by name.

    Attributes:
        resumed: whether the last :meth:`resume_or_load` found a checkpoint.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, trust: bool = False, **others: Any):
        super().__init__(model, save_dir, **others)
        self.trust = trust
        self.resumed = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, all else and ``kwargs`` to ``name.pth``, for ``--resume`` to go on from.

        Raises:
            UserError: if the file can't be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: other.state_dict() for key, other in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        write_atomically(path, partial(torch.save, data))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the file that ``--resume`` goes on from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda f: f.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest checkpoint that can be read, or load weights.

        Args:
            path: the weights to start from where nothing is resumed; "" for none.
            resume: whether to look for a checkpoint.

        Returns:
            the rest of the checkpoint.

        Raises:
            UserError: if there are checkpoints, but none can be read.
        """

        def read() -> tuple[bool, dict[str, Any]]:
            files = checkpoint_files(self.save_dir) if resume else []
            return bool(files), self._read_newest(files) if files else self._read(path)

        self.resumed, checkpoint = from_main_process(read)
        return self._apply(checkpoint, None if self.resumed else [])

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load one file, or an address that detectron2 knows; see detectron2's."""
        return self._apply(from_main_process(lambda: self._read(path)), checkpointables)

    def _read_newest(self, files: list[str]) -> dict[str, Any]:
        file, *before = files
        try:
            return self._read(file)
        except BrokenCheckpoint as error:
            if not before:
                raise UserError(
                    f"{error}; no other checkpoint in {self.save_dir!r} can be resumed from: "
                    "start without --resume"
                ) from error
            logger.warning(f"{error}; trying the one before, {before[0]!r}")
        return self._read_newest(before)

    def _read(self, path: str) -> dict[str, Any]:
        if not path:
            self.logger.info("No checkpoint found. Initializing model from scratch")
            return {}
        self.logger.info(f"Loading from {path} ...")
        url = urlparse(path)
        file = self._fetch(path, url._replace(query="").geturl())
        checkpoint = read_checkpoint(file, trust=self.trust)
        if parse_qs(url.query).get("matching_heuristics") == ["True"]:
            checkpoint["matching_heuristics"] = True
        for name, value in checkpoint["model"].items():
            if not isinstance(value, Tensor | np.ndarray):
                raise BrokenCheckpoint(
                    f"checkpoint {path!r}: {name!r} is a {type(value).__name__}, not a tensor"
                )
        return checkpoint

    def _fetch(self, path: str, address: str) -> str:
        """The file at an address, downloaded if it isn't local."""
        if "://" not in address:
            return address
        try:
            if ".." in address.split("/"):  # the cache's folders follow the address
                raise ValueError("an address with '..' in it")
            file: str = self.path_manager.get_local_path(address)
        except Exception as error:  # each handler of addresses raises its own
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise UserError(
                f"{path!r} can't be downloaded: {reason or type(error).__name__}: download it "
                "elsewhere and give the path of the file"
            ) from error
        return file

    def _apply(
        self, checkpoint: dict[str, Any], checkpointables: list[str] | None
    ) -> dict[str, Any]:
        if not checkpoint:
            return {}
        self._log_incompatible_keys(self._load_model(checkpoint))
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        if message := other_classes_message(self.model, incompatible.incorrect_shapes):
            self.logger.warning(message)
            names = {name for name, _, _ in incompatible.incorrect_shapes}
            missing = [key for key in incompatible.missing_keys if key not in names]
            incompatible = incompatible._replace(missing_keys=missing, incorrect_shapes=[])
        super()._log_incompatible_keys(incompatible)


def other_classes_message(model: nn.Module, mismatches: Iterable[Mismatch]) -> str:
    """One line on layers that don't fit because the model has another number of classes.

    Args:
        model: a dense detector with ``num_classes``.
        mismatches: ``incorrect_shapes`` of what fvcore's checkpointer found.

    Returns:
        the line; "" if all layers fit, or if one doesn't for another reason.
    """
    mismatches = list(mismatches)
    num_classes = getattr(model, "num_classes", None)
    if not (mismatches and isinstance(num_classes, int)):
        return ""
    background = interface_of(type(model)).num_background_scores
    found = {_classes_in_checkpoint(m, num_classes, background) for m in mismatches}
    if len(found) != 1 or found == {0}:
        return ""
    names = ", ".join(sorted(name for name, _, _ in mismatches))
    return (
        f"the checkpoint has {found.pop()} classes and this model {num_classes} (NUM_CLASSES): "
        f"{names} can't be loaded and start anew, to be trained; all other weights that the "
        "checkpoint has are loaded"
    )


def _classes_in_checkpoint(mismatch: Mismatch, num_classes: int, background: int) -> int:
    """The number of classes of a layer of the checkpoint, 0 if it is not a layer of classes."""
    _, theirs, ours = mismatch
    if len(theirs) == 0 or len(ours) == 0 or list(theirs[1:]) != list(ours[1:]):
        return 0
    # The outputs are those of A anchors: A * (classes + background).
    num_anchors, rest = divmod(ours[0], num_classes + background)
    if rest or not num_anchors or theirs[0] % num_anchors:
        return 0
    return max(theirs[0] // num_anchors - background, 0)


class LossState:
    """The training state of a model's losses as a checkpointable, saved beside the weights.

    Not part of the weights: fine-tuning starts with a new state.

    Args:
        model: the detector, wrapped in DDP or not; it may hold no IoU-balanced loss.
    """

    def __init__(self, model: nn.Module):
        self.losses = [m for m in model.modules() if isinstance(m, IoUBalancedLoss)]
        for loss in self.losses:
            loss.is_saved = True

    def state_dict(self) -> dict[str, Any]:
        """The state of each loss, in the order of the model's modules."""
        return {"losses": [loss.training_state() for loss in self.losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`; a plain detector's is empty."""
        for loss, loss_state in zip(self.losses, state["losses"], strict=bool(state["losses"])):
            loss.load_training_state(loss_state)
