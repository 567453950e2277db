"""The addresses of the replicas, from the file in which Envoy too reads them: EDS, in YAML or JSON.

A file that cannot be read, or is no such thing, changes nothing: the last good addresses stay, and the fault is
logged once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Final

import structlog
import yaml

log = structlog.get_logger()

AWAY: Final = frozenset({"UNHEALTHY", "DRAINING", "TIMEOUT"})
"""Envoy's health states of endpoints that get no new requests."""


class EndpointsError(Exception):
    """The file is not what it should be; the message says what and where."""


class EndpointsFile:
    """Watches the file by polling its identity: it is replaced by rename, and inotify is not everywhere.

    Args:
        on_change: called with the addresses (host:port) at the first reading and after each change.
    """

    def __init__(self, path: str, poll_seconds: float, on_change: Callable[[list[str]], None]) -> None:
        self._path = path
        self._poll_seconds = poll_seconds
        self._on_change = on_change
        self._identity: tuple[int, int, int] | None = None
        self._fault = ""

    async def watch(self) -> None:
        """Looks at the file for ever."""
        while True:
            self.poll()
            await asyncio.sleep(self._poll_seconds)

    def poll(self) -> None:
        """Looks once; the file is read only when it is another than at the last look."""
        try:
            status = os.stat(self._path)
            identity = (status.st_ino, status.st_mtime_ns, status.st_size)
            if identity == self._identity:
                return
            with open(self._path, encoding="utf-8") as file:
                addresses = parse_endpoints(file.read())
        except (OSError, UnicodeDecodeError, EndpointsError) as error:
            self._report(str(error))
            return
        self._identity = identity
        self._fault = ""
        log.info("endpoints_read", path=self._path, addresses=addresses)
        self._on_change(addresses)

    def _report(self, fault: str) -> None:
        if fault != self._fault:
            self._fault = fault
            log.warning("endpoints_unreadable", path=self._path, error=fault)


def parse_endpoints(text: str) -> list[str]:
    """The addresses in an EDS file, in order, each once.

    Raises:
        EndpointsError: it is not YAML, or not a DiscoveryResponse of cluster load assignments. Single endpoints that
            are not usable are left out; only where all of them are is the file refused.
    """
    try:
        document = yaml.load(text, Loader=_SafeLoader)
    except yaml.YAMLError as error:
        raise EndpointsError(f"not YAML: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("resources"), list):
        raise EndpointsError("not a DiscoveryResponse: there is no list `resources`")
    entries = [
        entry
        for resource in document["resources"]
        for group in _list(resource, "endpoints")
        for entry in _list(group, "lb_endpoints")
    ]
    addresses = [address for address in map(_address, entries) if address is not None]
    unusable = sum(not _is_away(entry) for entry in entries) - len(addresses)
    if unusable and not addresses:
        raise EndpointsError(f"none of its {unusable} endpoints has a socket_address with address and port_value")
    if unusable:
        log.warning("endpoints_left_out", count=unusable)
    return list(dict.fromkeys(addresses))


_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _address(entry: Any) -> str | None:
    if _is_away(entry):
        return None
    try:
        socket_address = entry["endpoint"]["address"]["socket_address"]
        host, port = str(socket_address["address"]), int(socket_address["port_value"])
    except (KeyError, TypeError, ValueError):
        return None
    if not host or not 0 < port < 65536:
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_away(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("health_status") in AWAY


def _list(parent: Any, name: str) -> list[Any]:
    value = parent.get(name) if isinstance(parent, dict) else None
    return value if isinstance(value, list) else []
