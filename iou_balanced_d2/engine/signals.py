"""SIGTERM and Ctrl-C end a training between two steps."""

import mmap
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from detectron2.utils import comm

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Whether a training is under way: one byte shared with the data workers, which are forked.
_training = mmap.mmap(-1, 1)


class Stopped(BaseException):
    """Ends the training loop. No Exception: it's no error, and nothing should catch it as one."""

    def __init__(self, signum: int):
        """Keep what for.

        Args:
            signum: the signal's number.
        """
        super().__init__(signum)
        self.signum = signum


class StopSignals:
    """A context that catches SIGTERM and SIGINT; a second one of the same kind ends at once.

    (Of the same kind, as the end of a launching process sends SIGINT to those it launched, after
    the SIGTERM that has ended it.)

    Attributes:
        interruptible: whether the next signal may raise :class:`Stopped` wherever it comes.
    """

    def __init__(self) -> None:
        """Catch nothing yet."""
        self.interruptible = False
        self._received: int | None = None
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        _training[0] = 1
        # Only there does Python let one; elsewhere signals do what they did.
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
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
        if os.getpid() != self._pid:
            return  # a data worker, which has inherited the handler and ends with its parent
        if self._received == signum:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(self._pid, signum)
        if self._received is None:
            self._received = signum
            if self.interruptible:
                raise Stopped(signum)

    def check(self) -> None:
        """Stop if a signal has come to any process; all of them must ask at the same time.

        Raises:
            Stopped: in every process.
        """
        several = comm.get_world_size() > 1
        for signum in comm.all_gather(self._received) if several else [self._received]:
            if signum is not None:
                raise Stopped(signum)


def outlive_in_worker() -> None:
    """Let a data worker outlive the signal that its whole process group gets during a training.

    Afterwards it ends, as the exit of its parent waits for it: an error's traceback keeps the data
    loader alive, which would have ended it before.
    """

    def handle(*_: Any) -> None:
        if not _training[0]:
            os._exit(0)

    for signum in _SIGNALS:
        signal.signal(signum, handle)
