"""Processes of a run: started here by PyTorch's elastic agent, or by torchrun."""

import argparse
import contextlib
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed import distributed_c10d

from ..errors import UserError
from .agreement import CommonError, check_same, versions
from .faults import TIMED_OUT, lost_connection, user_errors

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds in which the agent notices that a process has ended, and ends the others. (A killed
# process's data workers hide its end from the agent for 5 seconds.)
_NOTICED = 10.0
_SHUTDOWN = "300"  # seconds to write a checkpoint after a signal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """How many processes a run has, and where."""

    local_size: int  # processes on each machine
    num_machines: int
    machine_rank: int
    started: bool  # whether this process is one of them, rather than the one that starts them


def find_placement(args: argparse.Namespace) -> Placement:
    """Read torchrun's environment variables, or else detectron2's flags.

    Args:
        args: of :func:`~iou_balanced_d2.arguments.launch_argument_parser`.

    Raises:
        UserError: naming the flag that is wrong.
    """
    local_size, machines, machine = max(args.num_gpus, 1), args.num_machines, args.machine_rank
    if args.dist_timeout <= 0:
        raise UserError(f"--dist-timeout {args.dist_timeout:g} must be more than 0 seconds")
    if all(key in os.environ for key in _TORCHRUN):
        rank, size, _, local = (int(os.environ[key]) for key in _TORCHRUN[:4])
        found = Placement(local, size // local, rank // local, started=True)
        if local_size not in (1, local) or machines not in (1, found.num_machines):
            raise UserError(
                f"torchrun has started {found.num_machines} x {local} processes: leave out "
                "--num-gpus and --num-machines"
            )
        return found
    if machines < 1 or not 0 <= machine < machines:
        raise UserError(f"--machine-rank {machine} must be in 0..{machines - 1} (--num-machines)")
    if machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"--num-machines {machines} needs --dist-url tcp://HOST:PORT, the address of the "
            "machine with --machine-rank 0 and a free port there, the same on every machine"
        )
    _endpoint(args.dist_url)
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if machines == 1 and tasks != "1":  # they would all write to one OUTPUT_DIR
        raise UserError(
            f"srun has started this command {tasks} times: start torchrun once on each node, "
            "srun --ntasks-per-node 1 torchrun ... (docs/distributed.md)"
        )
    return Placement(local_size, machines, machine, started=False)


def _endpoint(url: str) -> str:
    """HOST:PORT of --dist-url; for "auto" a free port of this machine."""
    if url == "auto":
        return "127.0.0.1:0"
    if re.fullmatch(r"tcp://[^/]+:\d+", url):
        return url.removeprefix("tcp://")
    raise UserError(f"--dist-url {url!r} must be tcp://HOST:PORT")


def launch(
    main: Callable[[argparse.Namespace], object],
    args: argparse.Namespace,
    placement: Placement,
    *,
    device: str,
    facts: Mapping[str, str],
) -> int:
    """Run a function in every process of the run: in those started here, or in this one.

    Args:
        main: picklable, called with args.
        args: with resume, and what :func:`find_placement` needs.
        placement: from :func:`find_placement`.
        device: MODEL.DEVICE; it decides between NCCL and gloo.
        facts: what must be the same in all processes, by name.

    Returns:
        the exit code. The error of a started process has been printed.

    Raises:
        UserError: of the process that failed first.
    """
    run = _Run(main, args, placement, device, facts)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    args.restarted = placement.started and restarts != "0"
    with user_errors():
        if placement.local_size * placement.num_machines == 1:
            main(args)
        elif placement.started:
            run.work()
        else:
            return run.start()
    return 0


@dataclass(frozen=True)
class _Run:
    """A run of several processes; see :func:`launch`."""

    main: Callable[[argparse.Namespace], object]
    args: argparse.Namespace
    placement: Placement
    device: str
    facts: Mapping[str, str]

    def start(self) -> int:
        """Start this machine's processes and wait for their end; the exit code."""
        # Here, as the processes themselves don't need them.
        from torch.distributed.elastic.multiprocessing import SignalException, errors
        from torch.distributed.launcher.api import elastic_launch

        for name in ("distributed.elastic", "distributed.launcher", "multiprocessing"):
            agent = logging.getLogger(f"torch.{name}")  # else it logs each failure's traceback
            agent.addHandler(logging.NullHandler())
            agent.propagate = False
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN)
        if self.device == "cpu":
            threads = len(os.sched_getaffinity(0)) // self.placement.local_size
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        size = self.placement.local_size * self.placement.num_machines
        with tempfile.TemporaryDirectory(prefix="iou_balanced_d2_") as folder:
            try:
                elastic_launch(self._agent_config(folder), self.work)()
            except errors.ChildFailedError as error:
                return _report(*error.get_first_failure(), size)
            except SignalException as stopped:
                for child in multiprocessing.active_children():  # after a second signal
                    child.kill()
                for file in Path(folder).rglob("error.json"):  # e.g. no checkpoint on a full disk
                    return _report(0, errors.ProcessFailure(0, 0, 1, str(file)), size)
                return 128 + stopped.sigval
            except RuntimeError as error:
                if reason := lost_connection(error):
                    url = self.args.dist_url
                    raise UserError(f"no meeting at --dist-url {url}: {reason}") from error
                raise
        return 0

    def _agent_config(self, folder: str) -> Any:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig

        alone, timeout = self.args.dist_url == "auto", math.ceil(self.args.dist_timeout)
        others: dict[str, Any] = {}
        # As nohup wants it, where PyTorch lets one choose.
        if (
            signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            and "signals_to_handle" in LaunchConfig.__dataclass_fields__
        ):
            others["signals_to_handle"] = "SIGTERM,SIGINT,SIGQUIT"
        return LaunchConfig(
            min_nodes=self.placement.num_machines,
            max_nodes=self.placement.num_machines,
            nproc_per_node=self.placement.local_size,
            run_id="iou_balanced_d2",
            rdzv_backend="c10d" if alone else "static",
            rdzv_endpoint=_endpoint(self.args.dist_url),
            rdzv_configs={"rank": self.placement.machine_rank, "timeout": timeout},
            local_addr="127.0.0.1" if alone else None,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **others,
        )

    def work(self) -> None:
        """Be one of the processes."""
        place, args = self.placement, self.args
        if not place.started:
            os.setpgid(0, 0)  # Ctrl-C goes to the terminal's process group; the agent passes it on
        # For data workers: by "spawn", which starts this process, each would import everything.
        multiprocessing.set_start_method("fork", force=True)
        peers: list[tuple[bool, str, int]] = []
        with user_errors():
            try:
                _join(place.local_size, self.device, timedelta(seconds=args.dist_timeout))
                counts = {"--num-gpus": place.local_size, "--num-machines": place.num_machines}
                check_same({**{k: str(n) for k, n in counts.items()}, **versions(), **self.facts})
                peers = comm.all_gather((args.restarted, socket.gethostname(), os.getpid()))
                args.restarted = any(again for again, _, _ in peers)  # each agent counts its own
                self.main(args)
            except SystemExit:
                dist.destroy_process_group()
                raise
            except Exception as error:
                repeated = isinstance(error, CommonError) and comm.get_local_rank() > 0
                reason = lost_connection(error)
                if reason.endswith(TIMED_OUT):
                    _wake([pid for _, host, pid in peers if host == socket.gethostname()])
                elif repeated or reason:  # let another process print its error
                    time.sleep(_NOTICED)
                raise  # (without destroying the group, which may wait for dead processes)
            dist.destroy_process_group()


def _wake(pids: Sequence[int]) -> None:
    """Let processes of this machine go on that have been stopped, so that signals can end them."""
    logger.warning(
        "another process has not answered within --dist-timeout, as it hangs or has been stopped: "
        "the run ends; waiting for all processes to end"
    )
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _report(rank: int, failure: Any, size: int) -> int:
    """Print or raise why a process ended; the exit code."""
    if isinstance(failure.message, dict):  # an exception
        text = failure.message["message"]
        if text.startswith("UserError: "):
            raise UserError(text.removeprefix("UserError: "))
        print(failure.message["extraInfo"]["py_callstack"], file=sys.stderr, end="")
        return 1
    if failure.exitcode > 0:  # it has printed why
        return failure.exitcode
    killed = failure.signal_name()
    hint = " (the kernel does that when memory runs out)" if killed == "SIGKILL" else ""
    print(
        f"{os.path.basename(sys.argv[0])}: error: process {rank} of {size} was killed by "
        f"{killed}{hint}; --resume goes on from the last checkpoint",
        file=sys.stderr,
    )
    return 1


def _join(local_size: int, device: str, timeout: timedelta) -> None:
    """Make the process groups that detectron2 knows, each with the run's time-out."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # For groups made without a time-out, such as detectron2's own for gloo.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    # As detectron2's launch does, whose function for it differs between versions.
    for first in range(0, dist.get_world_size(), local_size):
        group = dist.new_group(list(range(first, first + local_size)))
        if first <= dist.get_rank() < first + local_size:
            comm._LOCAL_PROCESS_GROUP = group
