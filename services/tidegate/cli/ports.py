"""Which port each process of a mesh listens on, and whether it is free.

The names are those of the command line: `--port-of admin=9902` moves one, `--ports auto` lets the system choose all.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterable, Mapping
from typing import Final

LOOPBACK: Final = "127.0.0.1"

FREE_PORT_RANGE: Final = range(20_000, 32_000)
"""Where free ports are looked for; Linux takes those of outgoing connections from 32,768 on."""

FIXED: Final[Mapping[str, int]] = {
    "ingress": 8080,
    "mesh": 8081,
    "admin": 9901,
    "scheduler": 50051,
    "preprocess": 50052,
    "cache": 50053,
    "batch": 50054,
    "waiting": 50055,
    "scheduler-metrics": 51051,
    "preprocess-metrics": 51052,
    "cache-metrics": 51053,
    "batch-metrics": 51054,
    "waiting-metrics": 51055,
}
"""The processes of which there is one, and the first scheduler."""

PURPOSES: Final[Mapping[str, str]] = {
    "ingress": "the ingress",
    "mesh": "Envoy's mesh listener",
    "admin": "Envoy's admin page",
}


class PortError(Exception):
    """A port that cannot be used; the message names it and the flag that changes it."""


def replica_labels(replica_count: int, lite_replica_count: int = 0) -> list[str]:
    """What the names of a replica's processes end with: 0, 1, ..., lite-0, ..."""
    return [*map(str, range(replica_count)), *(f"lite-{index}" for index in range(lite_replica_count))]


def scheduler_names(count: int) -> list[str]:
    """The names of the schedulers' processes: scheduler, scheduler-1, ..."""
    return ["scheduler", *(f"scheduler-{index}" for index in range(1, count))]


def _scheduler_defaults(name: str) -> dict[str, int]:
    """The default ports of a scheduler beside the first."""
    index = int(name.rpartition("-")[2])
    return {name: 50040 + index, f"{name}-metrics": 51040 + index}


def replica_defaults(label: str) -> dict[str, int]:
    """The default ports of one replica: its model service, its Triton, and their metrics. `assign` moves on past those
    that another process has."""
    index = int(label.rpartition("-")[2])
    return {
        f"model-{label}": 50060 + index,
        f"model-{label}-metrics": 51060 + index,
        f"triton-{label}": 8001 + 10 * index,
        f"triton-{label}-metrics": 8002 + 10 * index,
    }


def assign(
    replica_count: int,
    lite_replica_count: int = 0,
    scheduler_count: int = 1,
    *,
    given: Mapping[str, int],
    auto: bool,
) -> dict[str, int]:
    """A port for every name: the given one, else a free one (auto) or the default.

    Raises:
        PortError: a name that no process has, or two processes on one port.
    """
    several = [
        *map(_scheduler_defaults, scheduler_names(scheduler_count)[1:]),
        *map(replica_defaults, replica_labels(replica_count, lite_replica_count)),
    ]
    known = [*FIXED, *(name for ports in several for name in ports)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise PortError(f"--port-of: there is no port named {unknown[0]!r}; there are {', '.join(known)}")
    defaults = _defaults(several, given)
    if auto:
        missing = [name for name in known if name not in given]
        defaults |= dict(zip(missing, free_ports(len(missing)), strict=True))
    ports = {name: given.get(name, defaults[name]) for name in known}
    holders: dict[int, str] = {}
    for name, port in ports.items():
        if port in holders:
            raise PortError(f"port {port} is given to both {holders[port]} and {name}; {flag(name)} changes it")
        holders[port] = name
    return ports


def _defaults(several: Iterable[Mapping[str, int]], given: Mapping[str, int]) -> dict[str, int]:
    """A port for every name; of processes of which there are several, one that another has already goes on to the next
    one that nobody has."""
    defaults = dict(FIXED)
    used = {*FIXED.values(), *given.values()}
    for ports in several:
        for name, port in ports.items():
            while name not in given and port in used:
                port += 1
            defaults[name] = port
            used.add(port)
    return defaults


def address(host: str, port: int) -> str:
    """host:port, with the brackets that an IPv6 host needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(listening_address: str) -> str:
    """Where to ask, from this machine, what listens there: on loopback where it listens on every interface."""
    host, _, port = listening_address.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, below those that the system gives to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(FREE_PORT_RANGE, len(FREE_PORT_RANGE)):
        if is_free(LOOPBACK, port):
            found.append(port)
        if len(found) == count:
            return found
    raise PortError(f"there are not {count} free ports from {FREE_PORT_RANGE.start} to {FREE_PORT_RANGE.stop - 1}")


def check_free(host: str, ports: Mapping[str, int]) -> None:
    """Raises PortError, a line each, for the ports that somebody listens on already."""
    faults = [
        f"port {port} ({PURPOSES.get(name, name)}) is taken{_holder(port)}: choose another with {flag(name)}"
        for name, port in ports.items()
        if not is_free(host if name == "ingress" else LOOPBACK, port)
    ]
    if faults:
        raise PortError("\n".join(faults))


def is_free(host: str, port: int) -> bool:
    """Whether a listener could be opened there now.

    Raises:
        PortError: the host is none of this machine's, or the port needs rights that are not there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise PortError(f"cannot listen on {address(host, port)}: {error.strerror}") from error
    return True


def flag(name: str) -> str:
    """The flag that moves a port."""
    return "--port N" if name == "ingress" else f"--port-of {name}=N, or --ports auto"


def parse_given(pairs: Iterable[str]) -> dict[str, int]:
    """`NAME=PORT` pairs of the command line.

    Raises:
        PortError: not such a pair, or no port number.
    """
    given = {}
    for pair in pairs:
        name, separator, number = pair.partition("=")
        if not separator or not number.isdigit() or not 1 <= int(number) <= 65_535:
            raise PortError(f"--port-of {pair}: must be NAME=PORT, with a port from 1 to 65535")
        given[name] = int(number)
    return given


def _holder(port: int) -> str:
    """Who listens there, where the system tells it to this user."""
    import psutil

    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1] == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""
