"""SIGTERM and Ctrl-C end a training between two steps."""

import contextlib
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from detectron2.utils import comm

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds within which two signals of a kind are one: `timeout` sends one to a process and one to
# its group, and a launching process hands on what its processes may get as well.
ONE_SIGNAL = 1.0
# Whether a training is under way: one byte shared with the data workers, which are forked.
_training = mmap.mmap(-1, 1)


class Stopped(BaseException):
    """Ends the training loop. No Exception: it's no error, and nothing should catch it as one."""

    def __init__(self, signum: int, *, together: bool = False):
        """Set the signal, and whether all processes stop here and so can wait for each other."""
        super().__init__(signum)
        self.signum = signum
        self.together = together


class StopSignals:
    """A context that catches SIGTERM and SIGINT; a later one of the same kind ends at once.

    (Later by a second. Of the same kind, as the end of a launching process sends its processes
    SIGINT, after the SIGTERM that ended it.) While a checkpoint is written signals are ignored.

    Attributes:
        received: the signal that has come to this process.
        agreed: one that has come to any process, where all of them know of it.
    """

    def __init__(self) -> None:
        """Catch nothing yet."""
        self.received: int | None = None
        self.agreed: int | None = None
        self._anywhere = False  # whether the next signal may stop wherever it comes
        self._ignored = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}
        self._when = 0.0  # a monotonic clock's, of the signal received

    def __enter__(self) -> "StopSignals":
        _training[0] = 1
        # Only there does Python let one; elsewhere signals do what they did.
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _training[0] = 0
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid or self._ignored:
            return  # (another pid: a data worker, which inherits this and ends with its parent)
        if self.received == signum and time.monotonic() > self._when + ONE_SIGNAL:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(self._pid, signum)
        if self.received is None:
            self.received, self._when = signum, time.monotonic()
            if self._anywhere:
                self.ignore()
                raise Stopped(signum)

    def ignore(self) -> None:
        """Ignore signals from here on."""
        self._ignored = True

    def check(self) -> None:
        """Stop between two steps, together with all other processes.

        A process that is alone looks whether a signal has come; several have told each other in
        the step (:attr:`agreed`), and stop at the same one.

        Raises:
            Stopped: in every process.
        """
        signum = self.received if comm.get_world_size() == 1 else self.agreed
        if signum is not None:
            self.ignore()
            raise Stopped(signum, together=True)

    @contextlib.contextmanager
    def stopping_anywhere(self) -> Iterator[None]:
        """A context where a signal stops this process at once, also one that came before."""
        self._anywhere = True
        try:
            if self.received is not None:
                self.ignore()
                raise Stopped(self.received)
            yield
        finally:
            self._anywhere = False

    def interruptible(self, function: Callable[[], T]) -> Callable[[], T]:
        """A function that does its work in :meth:`stopping_anywhere`."""

        def call() -> T:
            with self.stopping_anywhere():
                return function()

        return call


def outlive_in_worker() -> None:
    """Let a data worker outlive the signal that its whole process group gets during a training.

    Afterwards it ends, as the exit of its parent waits for it: an error's traceback keeps the data
    loader alive, which would have ended it before.
    """

    def handle(*_: Any) -> None:
        if not _training[0]:
            os._exit(0)

    for signum in SIGNALS:
        signal.signal(signum, handle)
