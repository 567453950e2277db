"""The addresses of the replicas, from the file in which Envoy too reads them: EDS, in YAML or JSON.

A file that cannot be read, or is no such thing, changes nothing: the last good addresses stay, and the fault is
logged once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import structlog

from tidegate.common.endpoints import EndpointsError, parse_endpoints

log = structlog.get_logger()


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
