"""Processes started on this machine: signals go on to them, and one story comes back."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, resource_tracker
from types import FrameType
from typing import Any, NamedTuple

from ..errors import UserError, one_line
from .faults import lost_connection
from .placement import Placement
from .signals import ONE_SIGNAL

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Seconds that the others get to end by themselves when one has failed, and after SIGTERM; and
# those that processes get when the one that started them is gone.
_GRACE = 60.0
_ORPHAN_GRACE = 60.0
_LONGEST = 30000  # characters of a traceback


class Failure(NamedTuple):
    """Why a process ended; the least of several is the story to tell."""

    lost_connection: bool  # others ended first
    when: float  # seconds of the machine's monotonic clock
    rank: int
    kind: str  # "user", "error", "killed" or "exit"
    text: str  # the message, the traceback, the signal's name, the exit code


class Children:
    """The processes of this machine."""

    def __init__(self, work: Callable[..., None], placement: Placement, args: tuple[Any, ...]):
        """Start them.

        Args:
            work: a function of a module, called with the local rank, the placement and args.
            placement: how many, and which ranks they are.
            args: further arguments, picklable.
        """
        self._placement = placement
        self._received: dict[int, float] = {}  # when (of a monotonic clock), by signal
        self._sent: set[int] = set()
        self._failures: list[Failure] = []
        self._pipes: list[connection.Connection] = []
        self._processes: list[Any] = []
        # It would unblock the signals. Processes inherit the block: a signal waits until they have
        # imported what they need to mind it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for local_rank in range(placement.local_size):
                self._start(work, (local_rank, placement, *args))
        except BaseException:  # e.g. for want of memory: Python's exit would wait for the others
            self._send(signal.SIGKILL, self._processes)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            raise

    def _start(self, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(os.getpid(), sender, work, args))
        process.start()
        sender.close()
        self._pipes.append(receiver)
        self._processes.append(process)

    def wait(self) -> int:
        """Wait for all of them, handing signals on.

        Returns:
            the exit code; a failure that is no UserError has been printed.

        Raises:
            UserError: of the process that failed first.
        """
        before = {s: signal.signal(s, self._forward) for s in _SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            self._wait()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return self._exit_code()

    def _forward(self, signum: int, _: FrameType | None) -> None:
        """Hand a signal on; a later one of the same kind ends all at once."""
        now = time.monotonic()
        first = self._received.setdefault(signum, now)
        if first == now:
            self._send(signum, self._processes)
        elif now > first + ONE_SIGNAL:
            self._send(signal.SIGKILL, self._processes)

    def _send(self, signum: int, processes: list[Any]) -> None:
        """Send a signal to those that run; SIGKILL to their data workers, too."""
        self._sent.add(signum)
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signum)
                    if signum == signal.SIGKILL:
                        os.killpg(process.pid, signum)

    def _wait(self) -> None:
        running, pipes = list(self._processes), list(self._pipes)
        steps = [signal.SIGTERM, signal.SIGKILL]  # for those that do not end after a failure
        deadline = float("inf")
        while running:
            # A sentinel is shared with data workers, which may outlive their process: hence the
            # time-out, and the look at the processes themselves.
            sentinels = [process.sentinel for process in running]
            ready = connection.wait([*sentinels, *pipes], timeout=1.0)
            # One that has failed may not end by itself, so its report comes first.
            for pipe in [pipe for pipe in pipes if pipe in ready]:
                pipes.remove(pipe)
                self._take_report(pipe)
            for process in [process for process in running if process.exitcode is not None]:
                running.remove(process)
                self._take_end(process)
            if self._failures and deadline == float("inf"):
                deadline = time.monotonic() + _GRACE
            if time.monotonic() > deadline and steps:
                self._send(steps.pop(0), running)
                deadline = time.monotonic() + _GRACE

    def _take_report(self, pipe: connection.Connection) -> None:
        with contextlib.suppress(EOFError, OSError):  # it has ended without one
            self._failures.append(pipe.recv())

    def _take_end(self, process: Any) -> None:
        """Take in how a process has ended, unless it has told."""
        local_rank, code = self._processes.index(process), process.exitcode
        pipe, rank = self._pipes[local_rank], self._placement.rank(local_rank)
        if pipe.poll():
            self._take_report(pipe)
        if code < 0 and -code not in self._sent:
            failure = Failure(False, time.monotonic(), rank, "killed", _signal_name(-code))
        elif code > 0 and code not in (128 + s for s in _SIGNALS):
            failure = Failure(False, time.monotonic(), rank, "exit", str(code))
        else:
            return
        if rank not in [f.rank for f in self._failures]:
            self._failures.append(failure)

    def _exit_code(self) -> int:
        # What others saw of processes that a signal has ended is no failure.
        failures = [f for f in self._failures if not (f.lost_connection and self._received)]
        if failures:
            return self._tell(min(failures))
        codes = [process.exitcode for process in self._processes]
        if self._received and (self._failures or min(codes) < 0):
            return 128 + next(iter(self._received))
        return max(codes)

    def _tell(self, failure: Failure) -> int:
        """Say why the run has ended; its exit code."""
        if failure.kind == "user":
            raise UserError(failure.text)
        if failure.kind == "error":
            print(failure.text, file=sys.stderr, end="")
            return 1
        if failure.kind == "exit":
            return int(failure.text)  # it has said why
        hint = " (the kernel does that when memory runs out)" if failure.text == "SIGKILL" else ""
        print(
            f"{os.path.basename(sys.argv[0])}: error: process {failure.rank} of "
            f"{self._placement.world_size} was killed by {failure.text}{hint}; "
            "--resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 1


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _child(
    parent: int,
    report: connection.Connection,
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """What a started process runs."""
    local_rank, placement = args[:2]
    rank = placement.rank(local_rank)
    # Its data workers are forked, as those of a process alone are: started by "spawn", this one
    # would have them import everything anew, and share nothing.
    multiprocessing.set_start_method("fork", force=True)
    # Ctrl-C in a terminal goes to a whole process group: of two of a kind the second one kills.
    os.setpgid(0, 0)
    _end_with(parent)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        work(*args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        now = time.monotonic()
        user = isinstance(error, UserError)
        text = one_line(error) if user else traceback.format_exc()
        kind = "user" if user else "error"
        report.send(Failure(_is_lost(error), now, rank, kind, text[-_LONGEST:]))
        sys.exit(2 if user else 1)


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error is, or comes from, the loss of another process."""
    while error is not None:
        if lost_connection(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_with(parent: int) -> None:
    """Have this process stopped when the one that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it went before
        os._exit(1)

    def watch() -> None:
        """For a process that waits for others and so can't mind the signal."""
        while os.getppid() == parent:
            time.sleep(2)
        time.sleep(_ORPHAN_GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
