"""Logs that can't be written, e.g. on a full disk: one warning a file, and the training goes on."""

import atexit
import contextlib
import logging
import os
import sys
import tempfile
import threading
from typing import Any

from detectron2.utils.events import (
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

_told: set[str] = set()


def _tell_once(name: str, error: BaseException) -> None:
    """On stderr, as the log itself is what fails."""
    if name not in _told:
        _told.add(name)
        with contextlib.suppress(OSError):
            print(
                f"warning: {name!r} can't be written: {error}; the training goes on, what could "
                "not be written is missing there",
                file=sys.stderr,
                flush=True,
            )


def let_logs_fail(*names: str) -> None:
    """Let loggers go on when their files can't be written.

    Python's logging prints a traceback for every line otherwise.

    Args:
        names: the loggers', e.g. "detectron2".
    """
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                _let_handler_fail(handler)


def _let_handler_fail(handler: Any) -> None:
    stream, explain = handler.stream, handler.handleError

    def handle_error(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            _tell_once(str(getattr(stream, "name", "log")), error)
        else:
            explain(record)  # a mistake in the call of the logger

    def close() -> None:
        with contextlib.suppress(OSError):
            stream.close()

    handler.handleError = handle_error
    if stream not in (sys.stdout, sys.stderr):
        # detectron2 closes its files at the exit, with a traceback for what could not be written.
        atexit.unregister(stream.close)
        atexit.register(close)


def let_writers_fail(writers: list[EventWriter], folder: str) -> list[EventWriter]:
    """Let writers of scalars go on when their files can't be written.

    Args:
        writers: detectron2's.
        folder: where their files are.

    Returns:
        writers that do the same.
    """
    chosen: list[EventWriter] = []
    for writer in writers:
        if isinstance(writer, TensorboardXWriter):
            _silence_tensorboard()
            name = os.path.join(folder, "events.out.tfevents.*")
            chosen.append(_FaultTolerantWriter(_RestartedTensorboard(writer, folder), name))
        elif isinstance(writer, JSONWriter):
            chosen.append(_FaultTolerantWriter(writer, os.path.join(folder, "metrics.json")))
        else:
            chosen.append(writer)
    return chosen


class _FaultTolerantWriter(EventWriter):
    """A writer whose file may fail."""

    def __init__(self, writer: EventWriter, name: str):
        self._writer = writer
        self._name = name

    def write(self) -> None:
        try:
            self._writer.write()
        except OSError as error:
            _tell_once(self._name, error)

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            _tell_once(self._name, error)


class _RestartedTensorboard(EventWriter):
    """TensorBoard's writer fails for good once it has failed: another one takes its place."""

    def __init__(self, writer: EventWriter, folder: str):
        self._writer: EventWriter | None = writer
        self._folder = folder

    def write(self) -> None:
        try:
            if self._writer is None:
                _check_room(self._folder)  # or there would be an empty file for each attempt
                self._writer = TensorboardXWriter(self._folder)
            self._writer.write()
        except OSError:
            self._writer = None
            # What only TensorBoard takes would pile up.
            get_event_storage().clear_images()
            get_event_storage().clear_histograms()
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _check_room(folder: str) -> None:
    with tempfile.TemporaryFile(dir=folder) as f:
        f.write(bytes(2**16))
        f.flush()
        os.fsync(f.fileno())


def _silence_tensorboard() -> None:
    """Its thread prints a traceback for an error that it hands on to the next write as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        handed_on = type(args.thread).__module__.startswith("tensorboard.")
        if not (handed_on and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook
