"""SIGTERM, SIGHUP and Ctrl-C end a training between two steps."""

import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from detectron2.utils import comm

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds within which two signals of a kind are one: `timeout` sends one to a process and one to
# its group, and a launching process passes on what its processes may get as well.
ONE_SIGNAL = 1.0
# Whether a training is under way: one byte shared with the data workers, which are forked.
_training = mmap.mmap(-1, 1)


class Stopped(BaseException):
    """Ends the training loop, of all processes ``together`` or of this one.

    No Exception, so that nothing handles it as an error.
    """

    def __init__(self, signum: int, *, together: bool = False):
        super().__init__(signum)
        self.signum = signum
        self.together = together


class StopSignals:
    """A context that catches :data:`SIGNALS`; a second one of the same kind ends at once.

    A second later or more, and of the same kind, as an agent that SIGTERM has ended sends its
    processes SIGINT. If a launcher is killed its processes get a SIGINT for each of its threads,
    on a busy machine over seconds: in them, one more SIGINT ends nothing. While a checkpoint is
    written signals are ignored. A SIGHUP that is ignored before, as by nohup, stays so.

    Attributes:
        received: the signal that has come to this process.
        agreed: a signal that has come to any process, where all of them know of it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed: int | None = None
        self._anywhere = False  # whether a signal may stop this process wherever it is
        self._ignored = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}
        self._when = 0.0  # by the monotonic clock, of the signal received

    def __enter__(self) -> "StopSignals":
        _training[0] = 1
        # Python allows handlers in the main thread only; in others signals do what they did.
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            hung_up = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            caught = [s for s in SIGNALS if not (hung_up and s == signal.SIGHUP)]
            self._before = {s: signal.signal(s, self._handle) for s in caught}
        return self

    def __exit__(self, *_: object) -> None:
        _training[0] = 0
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid or self._ignored:
            return  # (another pid: a data worker, which inherits this and ends with its parent)
        again = self.received == signum and time.monotonic() > self._when + ONE_SIGNAL
        if again and not (signum == signal.SIGINT and multiprocessing.parent_process()):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(self._pid, signum)
        if self.received is None:
            self.received, self._when = signum, time.monotonic()
            if self._anywhere:
                self._stop(signum)

    def ignore(self) -> None:
        """Ignore signals from here on."""
        self._ignored = True

    def _stop(self, signum: int, *, together: bool = False) -> None:
        self.ignore()
        raise Stopped(signum, together=together)

    def check(self) -> None:
        """Stop between two steps, together with all others, which know each other's signals."""
        signum = self.received if comm.get_world_size() == 1 else self.agreed
        if signum is not None:
            self._stop(signum, together=True)

    def interruptible(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function that a signal, also one from before, stops at once with :class:`Stopped`."""

        def call() -> Any:
            self._anywhere = True
            try:
                if self.received is not None:
                    self._stop(self.received)
                return function()
            finally:
                self._anywhere = False

        return call


def outlive_in_worker() -> None:
    """Let a data worker outlive the signal that its whole process group gets during a training.

    After the training it ends: its parent waits for it on exit, as an error's traceback keeps the
    data loader alive.
    """

    def handle(*_: Any) -> None:
        if not _training[0]:
            os._exit(0)

    for signum in SIGNALS:
        signal.signal(signum, handle)
