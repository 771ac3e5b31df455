"""Start the processes of a run, or be one of them; end as a single process would."""

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed import PrefixStore, distributed_c10d

from ..errors import UserError, one_line
from .agreement import Disagreement, versions
from .children import Children
from .faults import user_error
from .meeting import abandon, agree, linger
from .placement import Placement
from .rendezvous import choose_interface, find_store, open_store

# Seconds that telling the others that this process can't start may take: to reach the store, which
# may not be open yet, and (under torchrun) until rank 0 is there.
_CONNECTING = 3.0
_ENTERING = 30.0


def launch(
    main: Callable[..., object],
    args: tuple[Any, ...],
    placement: Placement,
    *,
    device: str,
    facts: Mapping[str, str],
) -> int:
    """Run a function in each process that is this one's to start, or in this one itself.

    Args:
        main: a function of a module, as processes import it anew.
        args: its arguments, picklable.
        placement: from :func:`find_placement`.
        device: MODEL.DEVICE; it decides between NCCL and gloo.
        facts: what must be the same in all processes, by name.

    Returns:
        the exit code; what went wrong in a started process has been printed.

    Raises:
        UserError: of whichever process came to it first.
    """
    if placement.world_size == 1:
        explained(main, *args)
        return 0
    store = open_store(placement) if placement.opens_store else None  # lives until the end
    if store is not None:
        placement = replace(placement, port=store.port)
    if placement.local_rank is None:
        return Children(work, placement, (main, args, device, facts)).wait()
    try:
        work(placement.local_rank, placement, main, args, device, facts)
    except Disagreement:
        if placement.local_rank == 0:
            raise
        return 2  # one line a machine will do
    return 0


@contextmanager
def telling_others(placement: Placement) -> Iterator[None]:
    """A context for what is checked before :func:`launch`: its UserError ends the others, too.

    Args:
        placement: from :func:`find_placement`.
    """
    try:
        yield
    except UserError as error:
        on_others = placement.world_size - (
            placement.local_size if placement.local_rank is None else 1
        )
        if on_others and not _tell(placement, one_line(error)) and placement.local_rank:
            sys.exit(2)  # it has been told already
        raise


def _tell(placement: Placement, reason: str) -> bool:
    """Tell the others why this process can't start; whether it is the first to do so."""
    rank = placement.rank(placement.local_rank or 0)
    server = None
    try:
        if placement.opens_store:
            server = open_store(placement)
            placement = replace(placement, port=server.port)
        found = find_store(replace(placement, timeout=min(placement.timeout, _CONNECTING)))
        hasty = replace(placement, timeout=min(placement.timeout, _ENTERING))
        first, store = abandon(found, hasty, rank, reason)
    except UserError:
        return True  # not there yet: they will wait
    if server is not None:
        atexit.register(linger, store, placement, server)  # when the line has been printed
    return first


def work(*args: Any) -> None:
    """Be one process of several; what a user can mend is raised as UserError.

    Args:
        args: of :func:`_take_part`.
    """
    explained(_take_part, *args)


def _take_part(
    local_rank: int,
    placement: Placement,
    main: Callable[..., object],
    args: tuple[Any, ...],
    device: str,
    facts: Mapping[str, str],
) -> None:
    """Find the other processes, agree with them, run.

    Args:
        local_rank: this process's number on its machine.
        placement: all processes.
        main: what to run.
        args: its arguments.
        device: MODEL.DEVICE.
        facts: what must be the same in all processes, by name.

    Raises:
        UserError: if the processes don't find each other or don't agree, or main's own.
    """
    cuda = device.startswith("cuda")
    if cuda:  # srun may show each process a GPU of its own only
        torch.cuda.set_device(local_rank if torch.cuda.device_count() > 1 else 0)
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // placement.local_size))
    rank = placement.rank(local_rank)
    store = agree(find_store(placement), placement, rank, {**versions(), **facts})
    choose_interface(placement)
    _join(PrefixStore("group", store), placement, rank, "nccl" if cuda else "gloo")
    try:
        main(*args)
        comm.synchronize()  # none may take the store away while another needs it
    except SystemExit:
        dist.destroy_process_group()
        raise
    # After an error a group may wait for processes that are gone: it ends with the process.
    dist.destroy_process_group()


def _join(store: dist.Store, placement: Placement, rank: int, backend: str) -> None:
    """Make the process groups that detectron2 knows, each with the run's time-out."""
    timeout = timedelta(seconds=placement.timeout)
    # What groups get that are made without one, such as detectron2's own for gloo.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=placement.world_size, timeout=timeout
    )
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(placement.local_size)
    else:  # detectron2 0.6, whose own launch does this
        for machine in range(placement.num_machines):
            first = machine * placement.local_size
            group = dist.new_group(list(range(first, first + placement.local_size)))
            if machine == placement.machine_rank:
                comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()


def explained(main: Callable[..., object], *args: Any) -> None:
    """Call a function; what a user can mend is raised as UserError, whatever it was.

    Args:
        main: the function.
        args: its arguments.

    Raises:
        UserError: e.g. for memory or a disk that is full.
    """
    try:
        main(*args)
    except UserError:
        raise
    except Exception as error:
        if told := user_error(error):
            raise told from error
        raise
