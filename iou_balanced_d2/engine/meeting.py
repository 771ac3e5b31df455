"""Processes meet before they start: all come and agree, or every one is told why not."""

import contextlib
import json
import socket
import time
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from torch.distributed import PrefixStore, Store

from ..errors import UserError
from .agreement import Disagreement, difference
from .placement import Placement

_ALL_HERE = "all here"
_PAUSE = 0.05  # seconds between two looks into the store
_LINGER = 10.0  # seconds that rank 0 keeps the store up for others to read why the run ends


class Round(NamedTuple):
    """What those processes share that have been started together.

    Attributes:
        store: their part of the store.
        number: counted from 1 where torchrun starts processes anew, else 0.
        everyone: the part of all rounds.
    """

    store: Store
    number: int
    everyone: Store

    def is_over(self) -> bool:
        """Whether rank 0 has been started anew."""
        return self.number > 0 and self.everyone.add("rounds", 0) != self.number


def enter(store: Store, placement: Placement, rank: int) -> Round:
    """Take this process's place in the newest round.

    The agents of torchrun start processes anew in the store that the ones before have used, and
    each counts the restarts of its own host only. So rank 0 counts rounds, and the others wait for
    one in which nobody has been them.

    Args:
        store: what all of them can reach.
        placement: the processes.
        rank: this process's number.

    Returns:
        the round.

    Raises:
        UserError: if rank 0 does not come within the time-out.
    """
    base = PrefixStore("iou_balanced_d2", store)
    if not placement.restarts:
        return Round(base, 0, base)
    until = time.monotonic() + placement.timeout
    number = base.add("rounds", 1 if rank == 0 else 0)
    while True:
        here = PrefixStore(str(number), base)
        if number and here.add(f"entered/{rank}", 1) == 1:
            return Round(here, number, base)
        while base.add("rounds", 0) == number:
            if time.monotonic() > until:
                raise UserError(
                    f"waited {placement.timeout:g} s for rank 0 of {placement.world_size} to start"
                )
            time.sleep(_PAUSE)
        number = base.add("rounds", 0)


def agree(store: Store, placement: Placement, rank: int, facts: Mapping[str, str]) -> Store:
    """Wait for all processes, and compare what they are about to do.

    Args:
        store: what all of them can reach.
        placement: the processes.
        rank: this process's number.
        facts: what must be the same everywhere, by name.

    Returns:
        the part of the store that they share.

    Raises:
        UserError: in every process, if two differ, two claim one rank, or one never comes.
    """
    while True:
        here = enter(store, placement, rank)
        verdict = _claim(here.store, placement, rank)
        if verdict:
            _end(here.store, verdict)
        else:
            told = {"host": socket.gethostname(), **facts}
            here.store.set(f"facts/{rank}", json.dumps(told))
            here.store.add("arrived", 1)
            verdict = _wait(here, placement, rank)
        here.store.add("read", 1)
        if verdict == _ALL_HERE:
            return here.store
        if verdict:
            if rank == 0:
                linger(here.store, placement)
            raise Disagreement(verdict)


def abandon(store: Store, placement: Placement, rank: int, reason: str) -> tuple[bool, Store]:
    """End the waiting of the others, as this process or machine can't take part.

    Args:
        store: what all of them can reach.
        placement: the processes.
        rank: the first one that will not come.
        reason: why, in one line.

    Returns:
        whether none has done this before; the part of the store that all of them share.

    Raises:
        UserError: if there is no one to tell within the time-out.
    """
    here = enter(store, placement, rank).store
    verdict = f"rank {rank} on {socket.gethostname()} can't start: {reason}"
    first = here.compare_set("verdict", "", verdict).decode() == verdict
    here.add("read", placement.local_size if placement.local_rank is None else 1)
    return first, here


def linger(store: Store, placement: Placement, _server: object = None) -> None:
    """Keep the store up until all others have read the verdict, but not for long.

    Args:
        store: the part of the store that they share.
        placement: the processes.
        _server: what ends the store when it goes, if it is this process that holds it.
    """
    until = time.monotonic() + min(_LINGER, placement.timeout)
    with contextlib.suppress(KeyboardInterrupt):
        while store.add("read", 0) < placement.world_size and time.monotonic() < until:
            time.sleep(_PAUSE)


def _claim(store: Store, placement: Placement, rank: int) -> str:
    """Take the rank, as one of so many processes; what is wrong with that, or ""."""
    size, me = placement.world_size, f"rank {rank} on {socket.gethostname()}"
    said = f"{size} ({placement.num_machines} x {placement.local_size})"
    base, base_said = store.compare_set("size", "", f"{me}\n{said}").decode().split("\n")
    if base_said != said:
        return (
            f"{me} disagrees with {base}: the number of processes is {said} there, {base_said} here"
        )
    mine = f"{me}\n{uuid.uuid4()}"
    theirs = store.compare_set(f"claim/{rank}", "", mine).decode()
    if theirs != mine:
        hosts = [claim.split("\n")[0].partition(" on ")[2] for claim in (theirs, mine)]
        return (
            f"two processes claim rank {rank} of {size}, on {hosts[0]} and on {hosts[1]}: each "
            "machine needs a --machine-rank of its own, and each run a --dist-url"
        )
    return ""


def _end(store: Store, verdict: str) -> None:
    """Say how the waiting ends; the first word counts."""
    store.compare_set("verdict", "", verdict)


def _wait(here: Round, placement: Placement, rank: int) -> str:
    """How the waiting ends, by rank 0 where all have come; "" if there is a newer round."""
    store, size = here.store, placement.world_size
    until = time.monotonic() + placement.timeout
    while not store.check(["verdict"]):
        if rank == 0 and store.add("arrived", 0) == size:
            _end(store, difference([_facts(store, r) for r in range(size)]) or _ALL_HERE)
        elif here.is_over():
            return ""
        elif time.monotonic() > until:
            _end(store, _missing(store, placement))
        else:
            time.sleep(_PAUSE)
    return store.get("verdict").decode()


def _facts(store: Store, rank: int) -> dict[str, str]:
    told: dict[str, str] = json.loads(store.get(f"facts/{rank}"))
    return told


def _missing(store: Store, placement: Placement) -> str:
    size = placement.world_size
    missing = [r for r in range(size) if not store.check([f"facts/{r}"])]
    machines = sorted({placement.machine_of(r) for r in missing})
    where = ", ".join(f"--machine-rank {m}" for m in machines)
    return (
        f"waited {placement.timeout:g} s for rank {', '.join(map(str, missing))} of {size} "
        f"({where}): not started there, ended by an error of its own, or this host can't be "
        "reached from there (--dist-timeout sets the seconds)"
    )
