"""Files that are written whole or not at all, and YAML that is read whatever it holds."""

import contextlib
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

from .errors import UserError

# Suffix of files that are still being written.
_UNFINISHED = ".unfinished"
# Of a YAML text; detectron2's configs have some hundred.
_MOST_VALUES = 100_000


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that the path always holds the whole new file or the whole old one.

    The content goes first to a new file beside it, whose name no other process uses. A killed
    process leaves that file behind; :func:`remove_unfinished` removes it.

    Args:
        path: the file; its folder exists.
        write: writes the content into an open file.

    Raises:
        UserError: naming the file, if it can't be written; the old file stays.
    """
    folder, name = os.path.split(os.path.abspath(path))
    start = os.fsdecode(os.fsencode(name)[:200])  # names have at most 255 bytes
    temporary = os.path.join(folder, f".{start}.{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        with open(temporary, "xb") as f:
            write(f)
            f.flush()
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


def make_folder(folder: str | Path) -> Path:
    """Make a folder, and those above it; it may be there.

    Returns:
        the folder.

    Raises:
        UserError: naming it, if it can't be made.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{str(folder)!r} can't be written: {error.strerror}") from error
    return Path(folder)


def remove_unfinished(folder: str | Path) -> None:
    """Remove files that killed processes left unfinished; no process may be writing there.

    Args:
        folder: may be missing.
    """
    for path in Path(folder).glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _why_not_written(error: BaseException | None) -> str:
    """The operating system's reason, which PyTorch may hide behind a RuntimeError of its own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return ""


def _sync_folder(folder: str) -> None:
    """Make the new name survive a power cut, on file systems that support it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 by :func:`write_atomically`."""
    write_atomically(path, lambda f: f.write(text.encode()))


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: PyYAML would drop all but the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue  # (What several << name is all merged.)
            if (first := known.setdefault((key.tag, key.value), key)) is not key:
                raise UserError(
                    f"{str(self.name)!r} has the key {key.value!r} twice, in lines "
                    f"{first.start_mark.line + 1} and {key.start_mark.line + 1}: write it once"
                )
        return node


def read_yaml(path: str | Path) -> Any:
    """The plain values of a YAML file.

    Args:
        path: of UTF-8; aliases in it may repeat values, but not without end.

    Raises:
        OSError, UnicodeDecodeError, RecursionError: if it can't be read.
        yaml.YAMLError: if it is no YAML, holds other objects, or too many values.
        UserError: naming the file, if a mapping has a key twice.
    """
    with open(path, encoding="utf-8-sig") as f:
        loader = _Loader(f)
        root = loader.get_single_node()
        if root is None:
            return None
        if _num_values(root, {}) > _MOST_VALUES:
            raise yaml.YAMLError(
                f"{str(path)!r} has over {_MOST_VALUES} values, as its aliases (*) repeat them"
            )
        return loader.construct_document(root)


def _num_values(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """The number of values of a tree whose branches may be one another; infinite in a circle."""
    if node not in known:
        known[node] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = [x for child in children for x in (child if isinstance(child, tuple) else (child,))]
        known[node] = 1 + sum(_num_values(x, known) for x in flat)
    return known[node]
