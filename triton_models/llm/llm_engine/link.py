"""A connection between two nodes.

Invariants: no end of it waits for ever to send; a host that is gone without a word ends it after `SILENCE_SECONDS`.
What a node says of itself is JSON, orders are bytes, and neither is unpickled here.
"""

import contextlib
import json
import os
import socket
import struct
from multiprocessing.connection import Connection
from typing import Any

SILENCE_SECONDS = 10
"""The bound on how long a host may be gone before the other one notices: unplugged, or without power."""

MOST_HELLO_BYTES = 1 << 16

_PROBE_SECONDS = 2


class Link:
    """One end. Reading raises EOFError or OSError where the other end is gone."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        self._socket = connected
        self.here: str = connected.getsockname()[0]
        """The address of this host that the other one reaches."""
        self.there: str = connected.getpeername()[0]
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_SECONDS),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_SECONDS // _PROBE_SECONDS - 1),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000),
        ):
            connected.setsockopt(level, option, value)
        bound_sending(connected, SILENCE_SECONDS)
        self.connection = Connection(os.dup(connected.fileno()))

    def say(self, **facts: object) -> None:
        """Sends facts of this node."""
        self.send(json.dumps(facts).encode())

    def hear(self) -> dict[str, Any]:
        """The other node's facts; ValueError where it sent something else."""
        try:
            facts = json.loads(self.connection.recv_bytes(MOST_HELLO_BYTES))
        except RecursionError as error:
            raise ValueError("expected a JSON object") from error
        if not isinstance(facts, dict):
            raise ValueError("expected a JSON object")
        return facts

    def hear_within(self, seconds: float) -> dict[str, Any]:
        """The same from one that may be anybody, also one that sends nothing, or half of it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _seconds(seconds))
        facts = self.hear()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _seconds(0))
        return facts

    def send(self, payload: bytes) -> None:
        """Sends bytes as they are."""
        self.connection.send_bytes(payload)

    def close(self) -> None:
        """Ends both ends; who reads is woken."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def bound_sending(connected: socket.socket, seconds: float) -> None:
    """No write waits longer for who does not read; it raises BlockingIOError then."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _seconds(seconds))


def _seconds(seconds: float) -> bytes:
    """A C timeval."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
