"""What can go wrong on a machine, in one line that says what to do."""

import contextlib
import errno
import io
import logging
import re
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType

import torch

from ..errors import UserError, one_line

_LESS_FOR_TRAINING = (
    "lower SOLVER.IMS_PER_BATCH (and SOLVER.BASE_LR by the same factor), or INPUT.MIN_SIZE_TRAIN "
    "and INPUT.MAX_SIZE_TRAIN"
)
_LESS_FOR_TEST = "lower INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST"
# Frames of detectron2's and our own evaluation.
_EVALUATION = {"inference_on_dataset", "validation_losses"}
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|not enough memory|Cannot allocate memory", re.I)
_WORKER_ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)", re.S)
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout",
    re.I,
)


def user_error(error: BaseException) -> UserError | None:
    """Explain an error to the user in one line; None if only its traceback explains it."""
    if isinstance(error, UserError):
        return UserError(one_line(error))
    if reason := lost_connection(error):
        return UserError(
            f"lost the connection to another process ({reason}): see the other processes' and "
            "hosts' output for the cause; --resume goes on from the last checkpoint"
        )
    message = _no_memory(error) or _no_space(error) or _worker_ended(error)
    return UserError(message) if message else None


def lost_connection(error: BaseException) -> str:
    """The reason why another process could not be reached, "" for any other error.

    Args:
        error: as raised by a collective of gloo or NCCL, or by their meeting place.

    Returns:
        the first line of PyTorch's message, without the place in its source, and what NCCL gives
        as its last error.
    """
    if isinstance(error, UserError):
        return lost_connection(error.__cause__) if error.__cause__ else ""
    is_lost = isinstance(error, _distributed_errors()) or (
        type(error) is RuntimeError and _LOST.search(str(error))
    )
    if not is_lost:
        return ""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = re.sub(r"^\[[^\]]*\] ?", "", line)
    if cause := re.search(r"^Last error:\s*(.+)", str(error), re.M):
        line = f"{line}: {cause[1].strip()}"
    return f"{line} (--dist-timeout)" if "Timed out" in line else line


def _distributed_errors() -> tuple[type[BaseException], ...]:
    """PyTorch's own, as far as this version has them."""
    names = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
    found = [getattr(torch.distributed, name, None) for name in names]
    return tuple(kind for kind in found if kind is not None)


def _no_memory(error: BaseException) -> str:
    on_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
    on_cpu = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (type(error) is RuntimeError and _NO_MEMORY.search(str(error)))
    )
    if not (on_gpu or on_cpu):
        return ""
    frames = _frames(error.__traceback__)
    in_evaluation = any(frame.f_code.co_name in _EVALUATION for frame in frames)
    less = _LESS_FOR_TEST if in_evaluation else _LESS_FOR_TRAINING
    if on_gpu:
        return f"out of memory on the GPU: {less}, or set SOLVER.AMP.ENABLED True"
    return f"out of memory: {less}, or DATALOADER.NUM_WORKERS"


def _no_space(error: BaseException) -> str:
    full = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is used up"}
    if not (isinstance(error, OSError) and error.errno in full):
        return ""
    name = error.filename or _open_file(error.__traceback__)
    where = f"{name!r} can't be written: " if name else ""
    return f"{where}{full[error.errno]}; make room, --resume goes on from the last checkpoint"


def _open_file(trace: TracebackType | None) -> str:
    """The file that was being written: the system names it on opening only."""
    for frame in reversed(_frames(trace)):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(getattr(value, "name", None), str):
                return str(value.name)  # type: ignore[attr-defined]
    return ""


def _worker_ended(error: BaseException) -> str:
    if not (type(error) is RuntimeError and _WORKER_ENDED.search(str(error))):
        return ""
    why = " ".join(str(error).split())
    return (
        f"{why} If it was for want of memory: lower DATALOADER.NUM_WORKERS, or make /dev/shm "
        "larger; --resume goes on from the last checkpoint"
    )


def _frames(trace: TracebackType | None) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(trace)]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A context whose errors are UserErrors wherever :func:`user_error` explains them.

    From then on detectron2's training loop logs tracebacks of other errors only.
    """
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_unexplained)
    try:
        yield
    except Exception as error:
        if explained := user_error(error):
            raise explained from error
        raise


def _is_unexplained(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or user_error(error) is None
