"""Checkpoints: written whole or not at all, and read by the main process for all others."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlparse

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import nn

from ..errors import UserError
from ..files import write_atomically
from ..modeling import IoUBalancedLoss, interface_of
from .safe_load import BrokenCheckpoint, read_checkpoint, weights_of

logger = logging.getLogger(__name__)

# Of the model's parameters, which weights must have to be used: a few have like names by chance.
_LEAST_SHARE = 0.05

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
        open(os.path.join(folder, "last_checkpoint"), encoding="utf-8", errors="replace") as f,
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
        strict: refuse weights that are not the whole model's, as a training that is resumed does.
        others: what else is saved and resumed, by name.

    Attributes:
        resumed: whether the last :meth:`resume_or_load` found a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        trust: bool = False,
        strict: bool = False,
        **others: Any,
    ):
        super().__init__(model, save_dir, **others)
        self.trust = trust
        self.strict = strict
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
            UserError: if there are checkpoints, but none can be read, or what is read doesn't fit.
        """

        def read() -> tuple[bool, str, dict[str, Any]]:
            files = checkpoint_files(self.save_dir) if resume else []
            return bool(files), *(self._read_newest(files) if files else (path, self._read(path)))

        self.resumed, path, checkpoint = from_main_process(read)
        if self.resumed and "trainer" in self.checkpointables and "trainer" not in checkpoint:
            raise UserError(
                f"checkpoint {path!r} has no state of a training ('trainer') to resume: pass it as "
                "MODEL.WEIGHTS, with another OUTPUT_DIR"
            )
        strict = self.strict or self.resumed
        return self._apply(path, checkpoint, None if self.resumed else [], strict=strict)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load one file, or an address that detectron2 knows; see detectron2's."""
        checkpoint = from_main_process(lambda: self._read(path))
        return self._apply(path, checkpoint, checkpointables, strict=self.strict)

    def _read_newest(self, files: list[str]) -> tuple[str, dict[str, Any]]:
        file, *before = files
        try:
            return file, self._read(file)
        except BrokenCheckpoint as error:
            if not before:
                raise UserError(
                    f"{error}; no other checkpoint in {self.save_dir!r} can be resumed from: "
                    "--overwrite starts anew"
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
        checkpoint["model"] = weights_of(path, checkpoint["model"])
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
        self,
        path: str,
        checkpoint: dict[str, Any],
        checkpointables: list[str] | None,
        *,
        strict: bool,
    ) -> dict[str, Any]:
        if not checkpoint:
            return {}
        theirs = list(checkpoint["model"])
        with loading(path, "model"):
            incompatible = self._load_model(checkpoint)
        self._check_match(path, theirs, incompatible, strict=strict)
        self._log_incompatible_keys(incompatible)
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                with loading(path, key):
                    self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint

    def _check_match(
        self, path: str, theirs: list[str], incompatible: Any, *, strict: bool
    ) -> None:
        """Refuse weights of which hardly any is the model's.

        If strict, also those that lack some of the model's, or are of a deeper network.
        """
        missing = set(_filter_reused_missing_keys(self.model, incompatible.missing_keys))
        own = dict(self.model.named_parameters()).keys()
        if len(own - missing) < _LEAST_SHARE * len(own):
            how = "convert it to detectron2's names, or append ?matching_heuristics=True"
            if any(name.startswith("layer1.") for name in theirs):
                how = "convert torchvision's by detectron2's tools/convert-torchvision-to-d2.py"
            raise UserError(
                f"checkpoint {path!r} has {len(own - missing)} of the model's {len(own)} "
                f"parameters: its names are {', '.join(map(repr, theirs[:2]))}, ..., the model's "
                f"{', '.join(list(own)[:2])}, ...: {how}"
            )
        surplus = list(filter(self._is_of_a_further_layer, incompatible.unexpected_keys))
        if not (strict and (missing or surplus)):
            return
        shapes = {k: f"{k} has shape {a}, not {b}" for k, a, b in incompatible.incorrect_shapes}
        problems = [shapes.get(k, f"{k} is missing") for k in sorted(missing)]
        problems += [f"{k} is not of the model" for k in surplus]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        classes = other_classes(self.model, incompatible.incorrect_shapes)
        raise UserError(
            f"checkpoint {path!r} does not fit the model: {classes and classes + ': '}"
            f"{', '.join(problems[:3])}{more}; use the config that it was trained with"
        )

    def _is_of_a_further_layer(self, name: str) -> bool:
        """Whether a name is of a deeper network, as in res4.6; other parts may be left unused."""
        module = self.model
        for part in name.split(".")[:-1]:
            children = dict(module.named_children())
            if part not in children:
                return part.isdigit()
            module = children[part]
        return False

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        if message := other_classes_message(self.model, incompatible.incorrect_shapes):
            self.logger.warning(message)
            names = {name for name, _, _ in incompatible.incorrect_shapes}
            missing = [key for key in incompatible.missing_keys if key not in names]
            incompatible = incompatible._replace(missing_keys=missing, incorrect_shapes=[])
        super()._log_incompatible_keys(incompatible)


@contextlib.contextmanager
def loading(path: str, key: str) -> Iterator[None]:
    """Errors of what does not expect what a checkpoint holds, as one line that names it."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"checkpoint {path!r}: its {key!r} can't be loaded: {reason}") from error


def other_classes_message(model: nn.Module, mismatches: Iterable[Mismatch]) -> str:
    """One line for :func:`other_classes`, on the layers that start anew; "" where that is ""."""
    mismatches = list(mismatches)
    if not (classes := other_classes(model, mismatches)):
        return ""
    names = ", ".join(sorted(name for name, _, _ in mismatches))
    return (
        f"{classes}: {names} can't be loaded and start anew, to be trained; all other weights that "
        "the checkpoint has are loaded"
    )


def other_classes(model: nn.Module, mismatches: Sequence[Mismatch]) -> str:
    """Both numbers of classes, where layers don't fit because the model has another one.

    Args:
        model: a dense detector with ``num_classes``.
        mismatches: ``incorrect_shapes`` of what fvcore's checkpointer found.

    Returns:
        part of a line; "" if all layers fit, or if one doesn't for another reason.
    """
    num_classes = getattr(model, "num_classes", None)
    if not (mismatches and isinstance(num_classes, int)):
        return ""
    background = interface_of(type(model)).num_background_scores
    found = {_classes_in_checkpoint(m, num_classes, background) for m in mismatches}
    if len(found) != 1 or found == {0}:
        return ""
    return f"the checkpoint has {found.pop()} classes and this model {num_classes} (NUM_CLASSES)"


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
        """Load a :meth:`state_dict`; a plain detector has none, and needs none."""
        saved = state["losses"]
        if not (self.losses and saved):
            return
        for loss, loss_state in zip(self.losses, saved, strict=True):
            loss.load_training_state(loss_state)
