"""Two hosts on one machine: network namespaces that are joined by a cable, and nothing else."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# No name server and no hosts file knows the hosts' names, as on many machines.
_NAMED = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
_CABLE = "eth0"
# Of no host: frames sent there are dropped without an answer.
_NOBODY = "02:00:00:00:00:ff"


@dataclass(frozen=True)
class Host:
    """A network namespace in which programs run under a host name of their own."""

    namespace: str
    name: str
    address: str

    def command(self, words: Sequence[object]) -> list[str]:
        """The command that runs a command here; its process id is that of the command itself.

        It gets SIGTERM when the tests are killed and so can't end it themselves.
        """
        with_us = ["setpriv", "--pdeathsig", "TERM"]
        named = ["unshare", "--uts", "sh", "-c", _NAMED, self.name]
        return [*with_us, "ip", "netns", "exec", self.namespace, *named, *map(str, words)]

    def start(
        self, words: Sequence[object], *, cwd: Path, env: Mapping[str, str], output: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command, stdout and stderr together into a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                self.command(words), cwd=cwd, env=env, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """The ids of all that runs here."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def end_processes(self) -> None:
        """Kill what still runs here, and what it starts meanwhile."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@dataclass(frozen=True)
class Network:
    """Two hosts and the cable between them."""

    hosts: tuple[Host, Host]

    def cut(self) -> None:
        """From now on packets vanish: no host sees a link go down, none gets a reset."""
        for here, there in (self.hosts, self.hosts[::-1]):
            neighbour = ("neigh", "replace", there.address, "lladdr", _NOBODY, "nud", "permanent")
            _ip("-n", here.namespace, *neighbour, "dev", _CABLE)


@contextlib.contextmanager
def two_hosts() -> Iterator[Network]:
    """Set up the network; afterwards remove it and end all that runs in it.

    Skips the test where this is not possible, saying why.
    """
    for program in ("ip", "unshare", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(f"network namespaces need the program {program!r}")
    run = f"iou-{os.getpid()}-{secrets.token_hex(3)}"
    hosts = (Host(f"{run}-a", "host-a", "10.0.0.1"), Host(f"{run}-b", "host-b", "10.0.0.2"))
    try:
        try:
            _lay_out(*hosts)
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split())
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {reason}")
        yield Network(hosts)
    finally:
        _take_down(hosts)


def _lay_out(first: Host, second: Host) -> None:
    for host in (first, second):
        _ip("netns", "add", host.namespace)
    peer = ("type", "veth", "peer", "name", _CABLE, "netns", second.namespace)
    _ip("-n", first.namespace, "link", "add", _CABLE, *peer)
    for host in (first, second):
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/30", "dev", _CABLE)
        for interface in ("lo", _CABLE):
            _ip("-n", host.namespace, "link", "set", interface, "up")
        _checked(host.command(["true"]))


def _take_down(hosts: Sequence[Host]) -> None:
    existing = {line.split()[0] for line in _ip("netns", "list").splitlines() if line}
    for host in hosts:
        if host.namespace in existing:
            host.end_processes()
            _ip("netns", "delete", host.namespace)


def _ip(*words: str) -> str:
    return _checked(["ip", *words])


def _checked(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
