"""The store through which the processes of a run find each other, and the way to it."""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from datetime import timedelta

from torch.distributed import TCPStore

from ..errors import UserError
from .placement import Placement

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the IPv4 address of an interface


def open_store(placement: Placement) -> TCPStore:
    """Open the store on this machine; its port is free or the given one, never one of another run.

    Args:
        placement: with port 0, or one machine, only processes of this machine can reach it.

    Returns:
        the store; it lives as long as this object.

    Raises:
        UserError: if the port can't be had.
    """
    try:
        listener = _listen(placement)
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            why = "it is in use, perhaps by another run: choose another"
        raise UserError(
            f"port {placement.port} of {placement.host} can't be opened for the processes to meet: "
            f"{why}"
        ) from error
    port = listener.getsockname()[1]
    return TCPStore(
        placement.host if placement.num_machines == 1 else "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=placement.timeout),
        master_listen_fd=listener.detach(),
    )


def _listen(placement: Placement) -> socket.socket:
    """A socket that only this machine reaches, or, for several, all by IPv4 and IPv6 alike."""
    if placement.num_machines > 1:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        address = ("", placement.port)
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    try:
        family = socket.getaddrinfo(placement.host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        family = socket.AF_INET
    return socket.create_server((placement.host, placement.port), family=family, backlog=2048)


def find_store(placement: Placement) -> TCPStore:
    """Connect to the store, waiting until it is open.

    Args:
        placement: host, port and time-out.

    Returns:
        this process's connection.

    Raises:
        UserError: if it can't be reached within the time-out.
    """
    until = time.monotonic() + placement.timeout
    while True:
        try:
            socket.create_connection((placement.host, placement.port), timeout=10).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"waited {placement.timeout:g} s for rank 0 of {placement.world_size} "
                    f"(--machine-rank 0) at tcp://{placement.host}:{placement.port}: "
                    f"{error.strerror or error}"
                ) from error
            time.sleep(0.2)
    return TCPStore(
        placement.host,
        placement.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=placement.timeout),
    )


def choose_interface(placement: Placement) -> None:
    """Let gloo use the network interface that leads to the store, unless it is told which.

    It would take the address that the host's own name resolves to, which on many a host is one
    that other hosts can't reach.

    Args:
        placement: its host is what is reached.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = _own_address(placement.host, placement.port)
    if address.startswith("127.") and placement.num_machines > 1:
        # The store's machine, whose name means itself: TEST-NET stands for anywhere else.
        address = _own_address("192.0.2.1", placement.port)
    if name := interface_of(address):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _own_address(host: str, port: int) -> str:
    """The IPv4 address this host sends from, to a host; "" if there is none. Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, port))
        return str(s.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address; "" if none has."""
    loopback = address.startswith("127.")
    wanted = "127.0.0.1" if loopback else address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == wanted:
                    return name
    return ""
