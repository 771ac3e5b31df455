"""Start the processes of a run, or be one of them; end as a single process would."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed import PrefixStore, distributed_c10d

from ..errors import UserError, one_line
from .agreement import Disagreement, abandon, agree, versions
from .children import Children
from .faults import user_error
from .placement import Placement
from .rendezvous import choose_interface, find_store, open_store


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

    (Not where it is the machine of rank 0 that fails, which is where they would be told.)

    Args:
        placement: from :func:`find_placement`.
    """
    try:
        yield
    except UserError as error:
        if placement.world_size > 1 and not placement.opens_store:
            rank = placement.rank(placement.local_rank or 0)
            first = True
            with suppress(UserError):  # not there yet: they will wait
                first = abandon(_attempt(replace(placement, timeout=3.0)), rank, one_line(error))
            if not first and placement.local_rank:
                sys.exit(2)  # it has been told already
        raise


def _attempt(placement: Placement) -> dist.Store:
    """The store; a restart by torchrun finds it with all that the attempt before has left."""
    return PrefixStore(f"iou_balanced_d2/{placement.attempt}", find_store(placement))


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
    store = _attempt(placement)
    agree(store, placement, rank, {**versions(), **facts})
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
