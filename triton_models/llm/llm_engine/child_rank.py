"""A rank's process as its parent sees it: the first rank's process on node 0, `join`'s on another node.

Invariant: it does not outlive its parent, whose end closes its connection.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from .config import EngineConfig
from .errors import EngineBroken, ModelLoadError
from .link import bound_sending

START_TIMEOUT = timedelta(minutes=30)
"""The bound on loading: what is slowest is reading a large model's part from a disk."""

STOP_SECONDS = 5.0


class Answering(Protocol):
    """Another rank or node, to which this process is connected."""

    name: str
    connection: Connection

    def take_answer(self) -> None:
        """Reads that it has loaded, or is ready; ModelLoadError with its own words where it could not."""


def wait_for_answers(others: Sequence[Answering], *, unless: Answering | None = None) -> None:
    """Waits until all have answered, or one that something is wrong, `unless` another one says anything before."""
    waiting = {other.connection: other for other in others}
    guards = {} if unless is None else {unless.connection: unless}
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while waiting:
        ready = wait([*waiting, *guards], max(0.0, deadline - time.monotonic()))
        if not ready:
            names = ", ".join(other.name for other in waiting.values())
            raise ModelLoadError(f"{names} has not loaded within {START_TIMEOUT}")
        for connection in ready:
            (guards.get(connection) or waiting.pop(connection)).take_answer()


class ChildRank:
    """One rank's process, and the connection to it.

    Args:
        address: where the rank listens for the others.
    """

    def __init__(self, config: EngineConfig, rank: int, address: str) -> None:
        self.name = f"rank {rank}"
        self._rank = rank
        self._is_closing = False
        ours, theirs = socket.socketpair()
        # An order may be larger than what the socket holds for a rank that hangs.
        bound_sending(ours, config.collective_timeout_seconds)
        self.connection = Connection(ours.detach())
        settings = {"config": dataclasses.asdict(config), "rank": rank, "address": address}
        with theirs:
            self._process = subprocess.Popen(
                [_python(), "-m", "llm_engine.rank_process", str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # The stub of Triton's backend has no PYTHONPATH; where this package lies is known here.
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_package_paths()])},
            )

    def take_answer(self) -> None:
        """Reads that the rank has loaded, or is ready; ModelLoadError with its own words where it could not."""
        try:
            fault = self.connection.recv_bytes().decode()
        except (EOFError, OSError):
            status = self._process.wait(STOP_SECONDS)
            raise ModelLoadError(f"{self.name} ended while it loaded, with status {status}") from None
        if fault:
            raise ModelLoadError(f"{self.name}: {fault}")

    def tell(self, order: bytes) -> None:
        """Hands over a step or another order; EngineBroken where the rank is gone, or hangs."""
        try:
            self.connection.send_bytes(order)
        except BlockingIOError as error:
            raise EngineBroken(f"{self.name} has not taken an order of {len(order)} bytes in time") from error
        except OSError as error:
            raise EngineBroken(f"{self.name} is gone, status {self._process.poll()}: {error}") from error

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Calls back when the process ends, unless it was told to."""

        def wait_for_end() -> None:
            fate = self.fate()
            if not self._is_closing:
                on_broken(fate)

        threading.Thread(target=wait_for_end, name=f"rank-{self._rank}-watch", daemon=True).start()

    def fate(self) -> str:
        """Waits until the process has ended, and says how."""
        return f"{self.name} has ended, with status {self._process.wait()}"

    def disconnect(self) -> None:
        """Lets the process leave, which it does when its connection ends."""
        self._is_closing = True
        self.connection.close()

    def end(self) -> None:
        """Waits until it has left, or kills it: one that still loads does not look at its connection."""
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _python() -> str:
    """The interpreter: in the stub of Triton's backend, which embeds one, it is the first of PATH."""
    if Path(sys.executable).name.startswith("python"):
        return sys.executable
    return shutil.which("python3") or "python3"


def _package_paths() -> list[str]:
    return [path for path in sys.path if path and Path(path).name == "site-packages"]
