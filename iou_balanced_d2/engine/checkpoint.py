"""Checkpoints that survive: written whole or not at all, and read by one process for all."""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from typing import IO, Any, TypeVar
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UserError
from .other_classes import other_classes_message
from .safe_load import BrokenCheckpoint, read_checkpoint

logger = logging.getLogger(__name__)

T = TypeVar("T")
# One name for all, so that what a kill leaves behind is replaced by the next file written.
UNFINISHED = "unfinished.tmp"


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at every moment the path holds all of it or what was there before.

    Args:
        path: the file.
        write: writes the content into an open file.

    Raises:
        UserError: naming the file, if it can't be written; what was there before stays.
    """
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, UNFINISHED)
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if reason := _why_not_written(error):
            raise UserError(
                f"{path!r} can't be written: {reason}; files written before are whole"
            ) from error
        raise
    _sync_folder(folder)


def _why_not_written(error: BaseException | None) -> str:
    """The system's words; PyTorch raises a RuntimeError of its own from within the system's."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return ""


def _sync_folder(folder: str) -> None:
    """Let the new name survive a power cut; not every file system can be asked to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checkpoint_files(folder: str) -> list[str]:
    """The checkpoints that a training can be resumed from.

    Args:
        folder: OUTPUT_DIR.

    Returns:
        paths, the best to resume from first: the one that ``last_checkpoint`` names, then those
        before it. Numbers above it are left over from an older, longer training.
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
    """Call a function in the main process only; every process gets its result.

    Args:
        function: its result, or the error it raises, must be picklable.

    Returns:
        the result.

    Raises:
        Exception: what the function raised, in every process.
    """
    if comm.get_world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if comm.is_main_process():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    # Not NCCL's, which would need the whole of it on the GPU.
    dist.broadcast_object_list(outcome, src=0, group=comm._get_global_gloo_group())
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


class RobustCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer with whole files, a way back, and no code in checkpoints.

    The main process decides what is loaded, reads it and hands it to the others: hosts need no
    common file system.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, trust: bool = False, **others: Any):
        """Set what is saved and where.

        Args:
            model: the detector, wrapped in DDP or not.
            save_dir: OUTPUT_DIR.
            trust: read checkpoints that hold other objects than tensors; that can run code.
            others: what is saved and resumed besides, by name.
        """
        super().__init__(model, save_dir, **others)
        self.trust = trust
        self.resumed = False  # whether the last resume_or_load went on from a checkpoint

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model and all else to ``name.pth``, and have ``--resume`` go on from it.

        Args:
            name: without extension.
            kwargs: saved besides.

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
        """Name the file that ``--resume`` goes on from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda f: f.write(last_filename_basename.encode()))

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from on this machine."""
        return bool(checkpoint_files(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest checkpoint that can be read, or load weights.

        Args:
            path: the weights to start from where nothing is resumed; "" for none.
            resume: whether to look for a checkpoint.

        Returns:
            what the checkpoint holds besides.

        Raises:
            UserError: if there are checkpoints, but none can be read.
        """

        def read() -> tuple[bool, dict[str, Any]]:
            files = checkpoint_files(self.save_dir) if resume else []
            return bool(files), self._read_newest(files) if files else self._read(path)

        self.resumed, checkpoint = from_main_process(read)
        return self._apply(checkpoint, None if self.resumed else [])

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load one file.

        Args:
            path: a file or an address that detectron2 knows; "" for none.
            checkpointables: what is loaded beside the model; None for all.

        Returns:
            what the file holds besides.

        Raises:
            UserError: if it can't be read.
        """
        return self._apply(from_main_process(lambda: self._read(path)), checkpointables)

    def _read_newest(self, files: list[str]) -> dict[str, Any]:
        for file, before in zip(files, [*files[1:], ""], strict=True):
            try:
                return self._read(file)
            except BrokenCheckpoint as error:
                if not before:
                    raise UserError(
                        f"{error}; no other checkpoint in {self.save_dir!r} can be resumed from: "
                        "start without --resume"
                    ) from error
                logger.warning(f"{error}; trying the one before, {before!r}")
        raise AssertionError("without files there is nothing to call this for")

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
        """The file that holds what is at an address, downloaded if need be."""
        if "://" not in address:
            return address
        try:
            if ".." in address.split("/"):  # the cache's folders follow the address
                raise ValueError("an address with '..' in it")
            file: str = self.path_manager.get_local_path(address)
        except Exception as error:  # whatever the handler of such addresses raises
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
        if told := other_classes_message(self.model, incompatible.incorrect_shapes):
            self.logger.warning(told)
            names = {name for name, _, _ in incompatible.incorrect_shapes}
            missing = [key for key in incompatible.missing_keys if key not in names]
            incompatible = incompatible._replace(missing_keys=missing, incorrect_shapes=[])
        super()._log_incompatible_keys(incompatible)
