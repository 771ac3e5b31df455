"""Annotations of other formats as COCO JSON, converted once and kept beside the data set.

A converted file is ``<data set folder>/iou_balanced_cache/<name>-<key>.json``. If that folder can't
be written or is a link (data from others could contain a link to any place), the file is in
``$XDG_CACHE_HOME/iou_balanced_d2``. The key is a digest of the converter's source code, of its
arguments, and of the list of annotation files with their sizes and times of change. The files are
not read for it, as that would take as long as converting them. An edit that keeps size and time
goes unnoticed; delete the cache then. Files of other sources of the same name stay; the folder may
be deleted at any time.
"""

import codecs
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import UserError
from ..files import write_text

logger = logging.getLogger(__name__)

CACHE_FOLDER = "iou_balanced_cache"
_LONGEST = 200  # bytes of a name, as quoted; file systems allow 255, and names of files add to it
_MANY = 500  # files; below, a progress bar does not pay
_READERS = 8  # threads; they wait for the disk, so more than there are cores
_MOST_NAMED = 5  # files in an error

Item = TypeVar("Item")
Result = TypeVar("Result")


class Source(Protocol):
    """Annotations that can be converted; equal sources are the same data set."""

    @property
    def path(self) -> str:
        """The annotation file, or the folder of many; the cache is put below that folder."""

    @property
    def image_root(self) -> str:
        """The folder that the images' ``file_name`` are relative to."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What is known without reading anything, for the MetadataCatalog."""

    def fingerprint(self) -> list[Any]:
        """What the result depends on, as JSON values; reads no annotation."""

    def convert(self) -> dict[str, Any]:
        """The annotations in COCO's instance format."""


@dataclass(frozen=True)
class ConvertedDataset:
    """What is registered in the DatasetCatalog: a call gives detectron2's dataset dicts."""

    name: str  # the data set's name
    source: Source  # its annotations

    def __call__(self) -> list[dict[str, Any]]:
        """Convert if needed and load; annotations keep "difficult" where there is one."""
        json_file = self.prepare()
        extra = ["difficult"]
        return list(load_coco_json(json_file, self.source.image_root, self.name, extra))

    def prepare(self) -> str:
        """Convert if needed; put the JSON file and the classes into the MetadataCatalog."""
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
    # (The catalog's `get` would load it.)
    if name in DatasetCatalog and isinstance(DatasetCatalog[name], ConvertedDataset):
        DatasetCatalog[name].prepare()


def check_name(name: str, key: str = "") -> None:
    """Raise UserError unless a data set's name can name a folder; ``key`` is where it stands."""
    leads_away = name in ("", ".", "..") or "/" in name or "\\" in name
    if leads_away or not name.isprintable() or len(quote(name, safe="")) > _LONGEST:
        where = f"{key}: " if key else ""
        raise UserError(
            f"{where}the name {name[:80]!r} can't be a folder's name, as results go to "
            "OUTPUT_DIR/inference/<name>: choose another one, without slashes"
        )


def register_converted(name: str, source: Source, *, key: str = "") -> None:
    """Register a source under ``name``; reads nothing. The same one again does nothing."""
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
    """The path of the converted annotations, after converting them if they have changed."""
    # One lock for all versions of a data set, as the old ones are removed under it.
    lock = quote(name, safe="")
    data = source.path if os.path.isdir(source.path) else os.path.dirname(source.path) or "."
    # Another source's file of this name may be in use. (Folders may be moved, or spelt otherwise.)
    fields = {**vars(source), "path": os.path.relpath(source.path, data), "image_root": ""}
    start = f"{lock}-{hashlib.sha256(repr(fields).encode()).hexdigest()[:8]}"
    key = hashlib.sha256(json.dumps([CONVERTER, source.fingerprint()]).encode()).hexdigest()[:16]
    file_name = f"{start}{key}.json"
    folders = [Path(data) / CACHE_FOLDER, _user_cache(data)]
    for folder in folders:
        if not folder.is_symlink() and os.access(folder / file_name, os.R_OK):
            return str(folder / file_name)
    for folder in folders:
        if _is_writable(folder, lock):
            break
        logger.warning(f"{folder} can't be written; the converted {name} is kept elsewhere")
    else:
        raise UserError(f"{folders[1]}: can't be written; set XDG_CACHE_HOME to a folder that can")
    with file_lock(str(folder / lock)):
        if not (folder / file_name).exists():
            logger.info(f"Converting the annotations of {name} into {folder / file_name} ...")
            write_text(folder / file_name, _dump(source.convert()))
            _remove_outdated(folder, start, keep=file_name)
    return str(folder / file_name)


def _user_cache(folder: str) -> Path:
    """A folder of this user's for one data set folder: two of them may use the same names."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:12]
    return Path(home) / "iou_balanced_d2" / digest


def _is_writable(folder: Path, name: str) -> bool:
    """Whether files can be made there; tried, as permissions don't show a read-only mount."""
    lock = folder / f"{name}.lock"
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


def _remove_outdated(folder: Path, start: str, *, keep: str) -> None:
    """Remove what other versions of this source have left, half-written files too."""
    file = re.escape(start) + r"[0-9a-f]{16}\.json"
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
    """Size in bytes and time of change in ns, which show whether a file has changed."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    return [status.st_size, status.st_mtime_ns]


def read_bytes(path: str) -> bytes:
    """The content of a file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def read_text(path: str) -> str:
    """The text of a file of UTF-8 or, with a byte order mark, UTF-16."""
    data = read_bytes(path)
    is_utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except ValueError as error:
        raise UserError(f"{path}: not a text file") from error


def map_files(
    function: Callable[[Item], Result], items: Sequence[Item], *, title: str, many: int = _MANY
) -> list[Result]:
    """Call a function for each file, in threads; of ``many`` or more, with a progress bar.

    Most of the time is spent waiting for many small files, above all on a network's disk. Not every
    program can start processes safely (CUDA, a script without a main guard). The function is called
    for all items; then its UserErrors are raised as one.
    """

    def call(item: Item) -> tuple[list[Result], str]:
        try:
            return [function(item)], ""
        except UserError as error:
            return [], str(error)

    # disable=None: a bar on a terminal, none in a log file.
    disable = None if len(items) >= many else True
    with ThreadPool(_READERS) as pool:
        done = pool.imap(call, items)
        found = list(tqdm(done, total=len(items), desc=title, disable=disable))
    errors = [error for _, error in found if error]
    if errors:
        more = f"; ... ({len(errors)} such)" if len(errors) > _MOST_NAMED else ""
        raise UserError("; ".join(errors[:_MOST_NAMED]) + more)
    return [result for results, _ in found for result in results]


# File name, width, height, and objects: number of the class from 0 on, XYWH box, further fields.
AnnotatedImage = tuple[str, int, int, Iterable[tuple[int, list[float], dict[str, Any]]]]


def coco_content(classes: Iterable[str], images: Iterable[AnnotatedImage]) -> dict[str, Any]:
    """Annotated images in COCO's format; images, annotations and classes are numbered from 1."""
    content: dict[str, Any] = {
        "info": {},
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    for image_id, (file_name, width, height, objects) in enumerate(images, start=1):
        content["images"].append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height}
        )
        for label, box, fields in objects:
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": box,
                "area": max(box[2], 0) * max(box[3], 0),
                "iscrowd": 0,
            }
            content["annotations"].append(annotation | fields)
    return content


# Name of the class, XYWH box, further fields.
NamedObject = tuple[str, list[float], dict[str, Any]]


def named_content(
    images: Sequence[tuple[str, int, int, Sequence[NamedObject]]], classes: Sequence[str] | None
) -> dict[str, Any]:
    """:func:`coco_content` of objects named by their class; None: of the sorted names found."""
    classes = classes or sorted({name for *_, objects in images for name, *_ in objects})
    numbers = {name: i for i, name in enumerate(classes)}
    for file, *_, objects in images:
        if unknown := [name for name, *_ in objects if name not in numbers]:
            raise UserError(f"{file}: class {unknown[0]!r} is not one of {', '.join(numbers)}")
    numbered = [
        (file, width, height, [(numbers[name], box, fields) for name, box, fields in objects])
        for file, width, height, objects in images
    ]
    return coco_content(classes, numbered)


def source_digest(*modules: str) -> str:
    """The digest of source files, taken when they are loaded.

    It replaces a version number, which is easily forgotten.
    """
    return hashlib.sha256(b"".join(Path(module).read_bytes() for module in modules)).hexdigest()


CONVERTER = source_digest(__file__)
