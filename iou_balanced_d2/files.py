"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .errors import UserError

# The end of the names that files have until they are whole.
_UNFINISHED = ".unfinished"


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at every moment the path holds all of it or what was there before.

    The content goes to a file of a new name beside it first, which no other process uses and
    which is no link. A kill can leave that one behind: :func:`remove_unfinished`.

    Args:
        path: the file; its folder exists.
        write: writes the content into an open file.

    Raises:
        UserError: naming the file, if it can't be written; what was there before stays.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(_UNFINISHED, f".{name[:200]}.", folder)
        with open(descriptor, "wb") as f:
            write(f)
            f.flush()
            os.fchmod(f.fileno(), 0o666 & ~_umask())
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if reason := _why_not_written(error):
            raise UserError(
                f"{str(path)!r} can't be written: {reason}; files written before are whole"
            ) from error
        raise
    _sync_folder(folder)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed processes left half-written; nobody may be writing to the folder.

    Args:
        folder: may be missing.
    """
    for path in Path(folder).glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _umask() -> int:
    """The permissions that new files don't get; the system tells by setting them only."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


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


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 by :func:`write_atomically`."""
    write_atomically(path, lambda f: f.write(text.encode()))
