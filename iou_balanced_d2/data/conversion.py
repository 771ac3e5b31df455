"""Annotations of other formats as COCO JSON, converted once and kept beside the data set.

A converted file is ``<data set folder>/iou_balanced_cache/<name>-<key>.json``. If that folder can't
be written or is a link (data from others could contain a link to any place), the file is in
``$XDG_CACHE_HOME/iou_balanced_d2``. The key is a digest of the converter's source code, of its
arguments, and of the list of annotation files with their sizes and times of change. The files are
not read for it, as that would take as long as converting them. An edit that keeps size and time
goes unnoticed; delete the cache then.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import UserError
from ..files import write_atomically
from .names import check_name

logger = logging.getLogger(__name__)

CACHE_FOLDER = "iou_balanced_cache"
_MANY = 500  # files; below, threads and a progress bar do not pay
_READERS = 8  # threads; they wait for the disk, so more than there are cores
_AHEAD = 64  # files
_MOST_NAMED = 5  # files in an error

Item = TypeVar("Item")
Result = TypeVar("Result")


class Source(Protocol):
    """Annotations that can be converted; equal sources are the same data set."""

    @property
    def folder(self) -> str:
        """The data set's folder; the cache is put below it."""

    @property
    def path(self) -> str:
        """The path that errors name: the annotation file, or the folder of many."""

    @property
    def image_root(self) -> str:
        """The folder that the images' ``file_name`` are relative to."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What is known without reading anything, for the MetadataCatalog."""

    def fingerprint(self) -> list[Any]:
        """What the result depends on, as JSON values; reads no annotation.

        Raises:
            UserError: if a file is missing.
        """

    def convert(self) -> dict[str, Any]:
        """The annotations in COCO's instance format.

        Raises:
            UserError: if a file is missing or broken.
        """


@dataclass(frozen=True)
class ConvertedDataset:
    """What is registered in the DatasetCatalog: a call gives detectron2's dataset dicts.

    Attributes:
        name: the data set's name.
        source: its annotations.
    """

    name: str
    source: Source

    def __call__(self) -> list[dict[str, Any]]:
        """Convert if needed and load; annotations keep "difficult" where there is one."""
        json_file = self.prepare()
        extra = ["difficult"]
        return list(load_coco_json(json_file, self.source.image_root, self.name, extra))

    def prepare(self) -> str:
        """Convert if needed; put the JSON file and the classes into the MetadataCatalog.

        Returns:
            the path of the JSON file.

        Raises:
            UserError: naming the data set, the file and what is wrong.
        """
        try:
            json_file = cached_json(self.name, self.source)
            classes = _read_classes(json_file)
        except UserError as error:
            raise UserError(f"data set {self.name!r}: {error}") from error
        metadata = MetadataCatalog.get(self.name)
        set_metadata(metadata, json_file=json_file, thing_classes=classes)
        return json_file


def prepare_dataset(name: str) -> None:
    """Convert a registered data set's annotations if needed, and complete its metadata.

    Sets ``json_file`` and ``thing_classes``; ``image_root``, ``evaluator_type`` and ``voc_style``
    are there from the registration on. Does nothing for data sets that need no conversion. Several
    processes may call it at once: one converts, the others wait.

    Args:
        name: the data set's name.

    Raises:
        UserError: if a file is missing or broken.
    """
    if is_converted(name):
        DatasetCatalog[name].prepare()


def is_converted(name: str) -> bool:
    """Whether the annotations of a data set, if registered, are converted by this package."""
    # (The catalog's `get` would load it.)
    return name in DatasetCatalog and isinstance(DatasetCatalog[name], ConvertedDataset)


def register_converted(name: str, source: Source, *, key: str = "") -> None:
    """Register a source under ``name``; reads nothing. The same one again does nothing.

    Args:
        name: the data set's name.
        source: its annotations.
        key: the config key to name in an error.

    Raises:
        UserError: if the name is taken by another data set, or can't name a folder.
    """
    check_name(name, key)
    dataset = ConvertedDataset(name, source)
    if name in DatasetCatalog:
        if DatasetCatalog[name] != dataset:
            where = f"{key}: " if key else ""
            raise UserError(f"{where}the name {name!r} is taken; choose another one")
        return
    DatasetCatalog.register(name, dataset)
    set_metadata(
        MetadataCatalog.get(name),
        image_root=source.image_root,
        evaluator_type="coco",
        **source.metadata,
    )


def set_metadata(metadata: Metadata, **values: Any) -> None:
    """Set metadata, also if it has another value because the source has changed."""
    for key, value in values.items():
        if metadata.get(key, value) != value:
            # detectron2 refuses to overwrite. What it derives from the classes goes with them.
            derived = ["thing_dataset_id_to_contiguous_id"] if key == "thing_classes" else []
            for outdated in [key, *derived]:
                metadata.__dict__.pop(outdated, None)
        setattr(metadata, key, value)


def cached_json(name: str, source: Source) -> str:
    """The path of the converted annotations, after converting them if they have changed.

    Args:
        name: the data set's name.
        source: its annotations.

    Returns:
        the path of a complete COCO JSON file.

    Raises:
        UserError: if a source file is missing or broken, or no cache folder can be written.
    """
    file_name = f"{quote(name, safe='')}-{_key_of(source)}.json"
    folders = [Path(source.folder) / CACHE_FOLDER, _user_cache(source.folder)]
    for folder in folders:
        if not folder.is_symlink() and os.access(folder / file_name, os.R_OK):
            return str(folder / file_name)
    for folder in folders:
        if _is_writable(folder, name):
            break
        logger.warning(f"{folder} can't be written; the converted {name} is kept elsewhere")
    else:
        raise UserError(f"{folders[1]}: can't be written; set XDG_CACHE_HOME to a folder that can")
    # One lock for all versions of a data set, as the old ones are removed under it.
    with file_lock(str(folder / quote(name, safe=""))):
        if not (folder / file_name).exists():
            logger.info(f"Converting the annotations of {name} into {folder / file_name} ...")
            text = _dump(source.convert())
            write_atomically(folder / file_name, lambda f: f.write(text.encode()))
            _remove_outdated(folder, name, keep=file_name)
    return str(folder / file_name)


def _key_of(source: Source) -> str:
    text = json.dumps([CONVERTER, source.fingerprint()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _user_cache(folder: str) -> Path:
    """A folder of this user's for one data set folder: two of them may use the same names."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:12]
    return Path(home) / "iou_balanced_d2" / digest


def _is_writable(folder: Path, name: str) -> bool:
    """Whether files can be made there; tried, as permissions don't show a read-only mount."""
    lock = folder / f"{quote(name, safe='')}.lock"
    if folder.is_symlink() or lock.is_symlink():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        # In a shared folder the lock may be another user's.
        open(lock, "a").close()
    except OSError:
        return False
    return True


def _remove_outdated(folder: Path, name: str, *, keep: str) -> None:
    """Remove what other keys of this data set have left, half-written files too."""
    file = re.escape(quote(name, safe="")) + r"-[0-9a-f]{16}\.json"
    pattern = re.compile(rf"{file}|\.{file}\.\w+\.unfinished")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.name != keep:
            path.unlink(missing_ok=True)


def _dump(content: dict[str, Any]) -> str:
    """JSON with the classes in the first line, which is read alone where they are all one needs."""
    head = json.dumps({"categories": content["categories"]})
    rest = json.dumps({key: value for key, value in content.items() if key != "categories"})
    return f"{head[:-1]},\n{rest[1:]}"


def _read_classes(json_file: str) -> list[str]:
    try:
        with open(json_file, encoding="utf-8") as f:
            head = f.readline().rstrip().removesuffix(",") + "}"
        return [category["name"] for category in json.loads(head)["categories"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{json_file}: can't be read; delete it and start again") from error


def stamp(path: str) -> list[int]:
    """Size in bytes and time of change in ns, which show whether a file has changed.

    Raises:
        UserError: if there is no such file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    return [status.st_size, status.st_mtime_ns]


def map_files(
    parse: Callable[[str, bytes], Result], paths: Sequence[str], *, title: str
) -> list[Result]:
    """Parse files; of many, reading ahead with threads.

    Most of the time is spent waiting for many small files, above all on a network's disk. Parsing
    them in threads as well was no faster when measured (they wait for the interpreter's lock), and
    not every program can start processes safely (CUDA, a script without a main guard).

    Args:
        parse: called with a file's path and content.
        paths: the files.
        title: written beside the bar.

    Returns:
        the results, in the order of the files.

    Raises:
        UserError: as :func:`map_all` does, also for files that can't be read.
    """
    readers = _read_ahead(paths) if len(paths) >= _MANY else map(_reader, paths)
    files = zip(paths, readers, strict=True)
    return map_all(lambda file: parse(file[0], file[1]()), files, len(paths), title=title)


def map_all(
    function: Callable[[Item], Result], items: Iterable[Item], number: int, *, title: str
) -> list[Result]:
    """Call a function for each item; of many, with a bar that shows the progress.

    Args:
        function: called with each item.
        items: what to go through.
        number: of the items.
        title: written beside the bar.

    Returns:
        the results, in the order of the items.

    Raises:
        UserError: with the messages of those that the function raised; it is called for all first.
    """
    # disable=None: a bar on a terminal, none in a log file.
    bar = tqdm(items, total=number, desc=title, disable=None if number >= _MANY else True)
    results, errors = [], []
    for item in bar:
        try:
            results.append(function(item))
        except UserError as error:
            errors.append(str(error))
    if errors:
        more = f"; ... ({len(errors)} such)" if len(errors) > _MOST_NAMED else ""
        raise UserError("; ".join(errors[:_MOST_NAMED]) + more)
    return results


def _reader(path: str) -> Callable[[], bytes]:
    return partial(_read, path)


def _read_ahead(paths: Sequence[str]) -> Iterator[Callable[[], bytes]]:
    """For each file, in order, what gives its content; at most :data:`_AHEAD` are held."""
    with ThreadPoolExecutor(_READERS) as executor:
        pending: deque[Future[bytes]] = deque()
        for path in paths:
            pending.append(executor.submit(_read, path))
            if len(pending) >= _AHEAD:
                yield pending.popleft().result
        while pending:
            yield pending.popleft().result


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def source_digest(*modules: str) -> str:
    """The digest of source files, taken when they are loaded.

    It replaces a version number, which is easily forgotten.
    """
    return hashlib.sha256(b"".join(Path(module).read_bytes() for module in modules)).hexdigest()


CONVERTER = source_digest(__file__)
