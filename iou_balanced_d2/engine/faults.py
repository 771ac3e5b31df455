"""Faults of the machine as errors of one line that says what to do."""

import contextlib
import errno
import io
import logging
import re
import traceback
from collections.abc import Iterator
from types import TracebackType

import torch
import torch.distributed as dist

from ..errors import UserError, one_line

_LESS_FOR_TRAINING = (
    "lower SOLVER.IMS_PER_BATCH (and SOLVER.BASE_LR by the same factor), or INPUT.MIN_SIZE_TRAIN "
    "and INPUT.MAX_SIZE_TRAIN"
)
_LESS_FOR_TEST = "lower INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST"
# Functions of detectron2's evaluation and of our own.
_EVALUATION = {"inference_on_dataset", "validation_losses"}
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|not enough memory|Cannot allocate memory", re.I)
_WORKER_ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)", re.S)
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout"
    r"|timeout caused pair closure",
    re.I,
)
# The end of the reason where a process has not answered.
TIMED_OUT = "(--dist-timeout)"
# PyTorch's errors of connections; before 2.1 only the second exists.
_DIST_ERRORS = tuple(
    getattr(dist, name) for name in ("DistError", "DistBackendError") if hasattr(dist, name)
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
    message = _no_memory(error) or _no_space(error) or _worker_ended(error) or _diverged(error)
    return UserError(message) if message else None


def lost_connection(error: BaseException) -> str:
    """Why another process could not be reached; "" for any other error.

    Args:
        error: of a collective of gloo or NCCL, or of a rendezvous.

    Returns:
        the first line of PyTorch's message, and NCCL's last error.
    """
    if isinstance(error, UserError):
        return lost_connection(error.__cause__) if error.__cause__ else ""
    found = type(error) is RuntimeError and _LOST.search(str(error))
    if not (found or isinstance(error, _DIST_ERRORS)):
        return ""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = re.sub(r"^\[[^\]]*\] ?", "", line)  # the place in PyTorch's source
    if cause := re.search(r"^Last error:\s*(.+)", str(error), re.M):
        line = f"{line}: {cause[1].strip()}"
    return f"{line} {TIMED_OUT}" if re.search("Timed out|timeout caused", line) else line


def _no_memory(error: BaseException) -> str:
    on_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
    on_cpu = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (type(error) is RuntimeError and _NO_MEMORY.search(str(error)))
    )
    if not (on_gpu or on_cpu):
        return ""
    functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    less = _LESS_FOR_TEST if functions & _EVALUATION else _LESS_FOR_TRAINING
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
    """The file that was being written: the system names a file only where it is opened."""
    for frame, _ in reversed(list(traceback.walk_tb(trace))):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(getattr(value, "name", None), str):
                return str(value.name)  # type: ignore[attr-defined]
    return ""


def _worker_ended(error: BaseException) -> str:
    if not (type(error) is RuntimeError and _WORKER_ENDED.search(str(error))):
        return ""
    why = " ".join(str(error).split())
    return (
        f"{why} If memory ran out: lower DATALOADER.NUM_WORKERS, or make /dev/shm larger; "
        "--resume goes on from the last checkpoint"
    )


def _diverged(error: BaseException) -> str:
    """detectron2 asserts that the boxes it clips are finite; losses are checked by each step."""
    if not (isinstance(error, AssertionError) and "infinite or NaN" in str(error)):
        return ""
    return (
        "the detector's boxes are infinite or NaN, as its weights have diverged: lower "
        "SOLVER.BASE_LR, or clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True)"
    )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A context that raises a UserError for each error that :func:`user_error` explains.

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
