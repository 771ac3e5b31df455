"""OUTPUT_DIR: for one training at a time, whose files are its own and stay inside."""

import argparse
import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .agreement import CommonError
from .checkpoint import from_main_process

logger = logging.getLogger(__name__)

# What a training leaves, besides results of evaluations, which the next one replaces.
_CHECKPOINTS = re.compile(r"last_checkpoint|model_(\d{7,}|final|best|ema)\.pth|metrics\.json")
_REST = re.compile(r"model_best\.json|log\.txt(\.rank\d+)?|events\.out\.tfevents\..*")
# Folders of evaluations.
_EVALUATIONS = ("inference", "ema", "tta")
_TAKEN = (errno.EACCES, errno.EAGAIN)
# Seconds that a resumed training waits for the end of the one before, which may be dying.
_PATIENCE = 30.0


def check_output_dir(folder: str) -> None:
    """Check that OUTPUT_DIR can be written and that no link leads out of it; makes the folder."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder!r} can't be written: {error.strerror}") from error
    root = Path(os.path.realpath(folder))
    for path in _written_into(root):
        if path.is_symlink() and root not in Path(os.path.realpath(path)).parents:
            raise UserError(
                f"OUTPUT_DIR {folder!r}: {str(path)!r} is a link to elsewhere, which the run would "
                "write to: remove it"
            )


def _written_into(root: Path) -> Iterator[Path]:
    """What a run writes into where it is there; all else it replaces, and a link with it."""
    yield from (root / name for name in ("config.yaml", "metrics.json", *_EVALUATIONS))
    yield from root.glob("log.txt*")
    for name in _EVALUATIONS:
        yield from (root / name).rglob("*")


def check_unused(folder: str) -> None:
    """Check that there is no training in OUTPUT_DIR."""
    if used := _matching(folder, _CHECKPOINTS):
        more = ", ..." if len(used) > 3 else ""
        raise CommonError(
            f"OUTPUT_DIR {folder!r} holds a training ({', '.join(used[:3])}{more}): --resume goes "
            "on with it, --overwrite deletes it; or give another OUTPUT_DIR"
        )


def _matching(folder: str, names: re.Pattern[str]) -> list[str]:
    """The files of these names that are not empty."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return sorted(
            e.name
            for e in entries
            if names.fullmatch(e.name) and e.stat(follow_symlinks=False).st_size
        )
    return []


@contextlib.contextmanager
def one_training(folder: str, args: argparse.Namespace, weights: str) -> Iterator[bool]:
    """Keep other trainings out of OUTPUT_DIR, until the context or the process ends.

    Each process of the run enters it; the main process holds a lock that also network disks know.
    Yields whether the training is to be resumed.
    """
    with contextlib.ExitStack() as held:
        yield from_main_process(lambda: _take(folder, args, weights, held))


def _take(folder: str, args: argparse.Namespace, weights: str, held: contextlib.ExitStack) -> bool:
    """Lock the folder, and settle what becomes of what is there; whether to resume it."""
    restarted = getattr(args, "restarted", False)
    path = os.path.join(folder, ".lock")
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise CommonError(f"{path!r} can't be opened: {error.strerror}") from error
    held.callback(os.close, descriptor)
    _lock(folder, descriptor, _PATIENCE if args.resume or restarted else 0.0)
    before = os.pread(descriptor, 1000, 0)
    # Empty while it is not settled, so that a restart of what is refused here is refused, too.
    os.ftruncate(descriptor, 0)
    resume = args.resume or (restarted and before.endswith(_run_id()))
    if args.overwrite and not resume:
        _delete(folder, weights)
    if not resume:
        check_unused(folder)
    with contextlib.suppress(OSError):  # no room: others see no name
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode() + _run_id(), 0)
    return bool(resume)


def _run_id() -> bytes:
    """The same in a run that torchrun restarts: its name, or the process that restarts it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return (f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name).encode()


def _lock(folder: str, descriptor: int, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            # Unlike flock's it is not inherited by data workers, which die later than a process.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                logger.warning(
                    f"OUTPUT_DIR {folder!r} can't be locked ({error.strerror}): make sure that no "
                    "other training writes there"
                )
                return
        if time.monotonic() >= until:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace").partition("\n")[0]
            raise CommonError(
                f"OUTPUT_DIR {folder!r}: another training (process {owner or 'unknown'}) writes "
                "there: wait for its end, or give another OUTPUT_DIR"
            )
        time.sleep(0.5)


def _delete(folder: str, weights: str) -> None:
    """Remove what a training has left, unless MODEL.WEIGHTS is among it."""
    paths = [os.path.join(folder, n) for p in (_CHECKPOINTS, _REST) for n in _matching(folder, p)]
    weights = weights.split("?")[0]
    if any(os.path.exists(weights) and os.path.samefile(p, weights) for p in paths):
        raise CommonError(
            f"MODEL.WEIGHTS {weights!r} is a file that --overwrite would delete: give another "
            "OUTPUT_DIR"
        )
    for path in paths:
        os.unlink(path)
    if paths:
        logger.warning(f"--overwrite: deleted {len(paths)} files of a training in {folder!r}")
