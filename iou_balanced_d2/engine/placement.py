"""How many processes a run has, and which of them this one is or starts.

Said by detectron2's flags, by torchrun's environment, or by that of SLURM's srun.
"""

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_PER_NODE = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")


@dataclass(frozen=True)
class Placement:
    """The processes of a run.

    Attributes:
        world_size: processes on all machines.
        local_size: processes on each machine.
        machine_rank: this machine's number.
        local_rank: this process's number on its machine; None if it starts those processes.
        host: where the store is through which processes find each other.
        port: the store's; 0 lets the system choose a free one.
        opens_store: whether this process opens the store, rather than finds it open.
        timeout: seconds that processes wait for each other.
        restarts: whether all processes are started anew when one has died, as torchrun does.
    """

    world_size: int = 1
    local_size: int = 1
    machine_rank: int = 0
    local_rank: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    opens_store: bool = True
    timeout: float = 600.0
    restarts: bool = False

    @property
    def num_machines(self) -> int:
        """The number of machines."""
        return self.world_size // self.local_size

    def rank(self, local_rank: int) -> int:
        """The number, among all, of a process of this machine."""
        return self.machine_rank * self.local_size + local_rank

    def machine_of(self, rank: int) -> int:
        """The number of the machine that a process runs on."""
        return rank // self.local_size


def find_placement(
    args: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> Placement:
    """Find it in torchrun's environment, in SLURM's, else in the flags.

    Args:
        args: with detectron2's num_gpus, num_machines, machine_rank and dist_url, and dist_timeout.
        environment: the process's.

    Returns:
        the placement.

    Raises:
        UserError: if the flags contradict each other or the environment.
    """
    if args.dist_timeout <= 0:
        raise UserError(f"--dist-timeout {args.dist_timeout:g} must be more than 0 seconds")
    if all(key in environment for key in _TORCHRUN):
        placement = _of_torchrun(environment, args.dist_timeout)
        _check_flags(args, placement, "torchrun")
        return placement
    several = max(args.num_gpus, args.num_machines) > 1
    # Only srun sets these: the script of sbatch sees the other variables, but is one process.
    if not several and any(key in environment for key in ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")):
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        if tasks is not None and tasks > 1 and "SLURM_PROCID" in environment:
            return _of_slurm(environment, tasks, args.dist_timeout)
    return _of_flags(args)


def _of_flags(args: argparse.Namespace) -> Placement:
    local_size, machines = max(args.num_gpus, 1), args.num_machines
    if machines < 1:
        raise UserError(f"--num-machines {machines} must be 1 or more")
    if not 0 <= args.machine_rank < machines:
        raise UserError(f"--machine-rank {args.machine_rank} must be in 0..{machines - 1}")
    host, port = "127.0.0.1", 0
    if args.dist_url not in (None, "auto"):
        host, port = _host_and_port(args.dist_url)
    elif machines > 1:
        raise UserError(
            f"--num-machines {machines} needs --dist-url tcp://HOST:PORT, the address of the "
            "machine with --machine-rank 0 and a free port there, the same on every machine"
        )
    return Placement(
        world_size=local_size * machines,
        local_size=local_size,
        machine_rank=args.machine_rank,
        host=host,
        port=port,
        opens_store=args.machine_rank == 0,
        timeout=args.dist_timeout,
    )


def _host_and_port(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "tcp":
        raise UserError(f"--dist-url {url!r} must be tcp://HOST:PORT")
    return host, port


def _of_torchrun(environment: Mapping[str, str], timeout: float) -> Placement:
    rank, size, local_rank, local_size, port = (
        _number(environment, key) or 0 for key in (*_TORCHRUN[:4], "MASTER_PORT")
    )
    if local_size < 1 or size % local_size or rank % local_size != local_rank:
        raise UserError(
            f"torchrun's RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank} and "
            f"LOCAL_WORLD_SIZE {local_size}: every machine must run equally many processes"
        )
    return Placement(
        world_size=size,
        local_size=local_size,
        machine_rank=rank // local_size,
        local_rank=local_rank,
        host=environment["MASTER_ADDR"],
        port=port,
        opens_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
        restarts="TORCHELASTIC_RUN_ID" in environment,
    )


def _check_flags(args: argparse.Namespace, placement: Placement, starter: str) -> None:
    sizes = {"--num-gpus": placement.local_size, "--num-machines": placement.num_machines}
    for (flag, size), given in zip(sizes.items(), (args.num_gpus, args.num_machines), strict=True):
        if given not in (1, size):
            raise UserError(f"{flag} {given}, but {starter} has started {size}: leave {flag} out")


def _of_slurm(environment: Mapping[str, str], tasks: int, timeout: float) -> Placement:
    rank = _number(environment, "SLURM_PROCID") or 0
    local_rank = _number(environment, "SLURM_LOCALID") or 0
    per_node = next((environment[key] for key in _PER_NODE if environment.get(key)), str(tasks))
    match = re.fullmatch(r"(\d+)(\(x\d+\))?", per_node)
    local_size = int(match.group(1)) if match else 0
    if not local_size or tasks % local_size or rank % local_size != local_rank:
        raise UserError(
            f"srun's {tasks} tasks ({per_node} per node; task {rank} is number {local_rank} of its "
            "node): each node must have equally many, in order (--ntasks-per-node N, "
            "--distribution=block)"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job = _number(environment, "SLURM_JOB_ID") or 0
    step = _number(environment, "SLURM_STEP_ID") or 0
    default = first_host(nodes) if local_size < tasks else "127.0.0.1"
    return Placement(
        world_size=tasks,
        local_size=local_size,
        machine_rank=rank // local_size,
        local_rank=local_rank,
        host=environment.get("MASTER_ADDR") or default,
        # Two steps of a job may share a node.
        port=_number(environment, "MASTER_PORT") or 20000 + (job * 7 + step) % 10000,
        opens_store=rank == 0,
        timeout=timeout,
    )


def _number(environment: Mapping[str, str], *keys: str) -> int | None:
    """The first of some variables that is set, as a number."""
    for key in keys:
        if value := environment.get(key, ""):
            if not value.isdecimal():
                raise UserError(f"the environment's {key} {value!r} is no number")
            return int(value)
    return None


def first_host(nodes: str) -> str:
    """The first host of SLURM's short form of a list of hosts.

    Args:
        nodes: e.g. "node[03-05,9],gpu7".

    Returns:
        e.g. "node03".

    Raises:
        UserError: if the list is empty or broken.
    """
    host = next(_parts(nodes), "")
    while match := re.match(r"([^\[\]]*)\[(\d+)[^\[\]]*\](.*)$", host):
        host = "".join(match.groups())
    if not host or set("[]") & set(host):
        raise UserError(f"no host in SLURM's list of nodes {nodes!r}: set MASTER_ADDR")
    return host


def _parts(nodes: str) -> Iterator[str]:
    """A list of hosts, split at the commas outside of brackets."""
    return (part for part in re.split(r",(?![^\[]*\])", nodes.strip()) if part)
