"""The first rank's view of the others: starts a process a rank, gives each every step, and ends them.

Invariants: all ranks load at once; none outlives the first, whose end closes its connection; a rank that is gone,
or does not take a step in time, is EngineBroken, at the latest with the next step.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from .config import EngineConfig
from .errors import EngineBroken, ModelLoadError
from .rank import LoadedRank
from .ranks import Group
from .step_tensors import RowWork, StepTensors
from .weights import check_model

START_TIMEOUT = timedelta(minutes=30)
"""The bound on loading: what is slowest is reading a large model's part from a disk."""

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
"""The bound on how far ranks may be apart within a step."""

STOP_SECONDS = 5.0


class RankGroup:
    """The first rank, and through it all of them; it has a `Rank`'s interface."""

    def __init__(self, config: EngineConfig) -> None:
        size = config.tensor_parallel_size
        check_model(Path(config.model_path), size)
        self._others: list[_Other] = []
        try:
            # A file that only this user can read: torch's store by TCP listens on all interfaces, and trusts everybody.
            with tempfile.TemporaryDirectory(prefix="tidegate-ranks-") as folder:
                meeting = str(Path(folder) / "ranks")
                for rank in range(1, size):
                    self._others.append(_Other(config, rank, meeting))
                self.loaded = LoadedRank(config, 0)
                for other in self._others:
                    other.wait_for_answer()
                group = Group(
                    distributed.FileStore(meeting, size),
                    0,
                    column_counts=self.loaded.column_counts(),
                    device=self.loaded.device,
                    timeout=COLLECTIVE_TIMEOUT,
                )
            self._rank = self.loaded.ready(group)
            for other in self._others:
                other.wait_for_answer()
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> Any:
        """The first rank's."""
        return self._rank.model

    def lay_out(self, works: list[RowWork]) -> StepTensors:
        """A step's tensors on the first rank."""
        return self._rank.lay_out(works)

    def forward(self, step: StepTensors, *, give_up: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """A step's logits, as a `Rank`'s; a step that others compute too is never given up."""
        self._tell("step", step.works, step.sample_rows.tolist())
        return self._rank.forward(step)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that hold what is not finite, on all ranks."""
        self._tell("clear", blocks)
        self._rank.clear(blocks)

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Calls back, from a thread of its own, when a rank ends that should not."""
        for other in self._others:
            other.watch(on_broken)

    def close(self) -> None:
        """Ends the other ranks."""
        for other in self._others:
            other.disconnect()
        for other in self._others:
            other.end()

    def _tell(self, *words: object) -> None:
        for other in self._others:
            other.tell(words)


class _Other:
    """One other rank's process, and the connection to it."""

    def __init__(self, config: EngineConfig, rank: int, meeting: str) -> None:
        self._rank = rank
        self._is_closing = False
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        settings = {"config": dataclasses.asdict(config), "rank": rank, "meeting": meeting}
        with theirs:
            self._process = subprocess.Popen(
                [_python(), "-m", "llm_engine.rank_process", str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # The stub of Triton's backend has no PYTHONPATH; where this package lies is known here.
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_package_paths()])},
            )

    def wait_for_answer(self) -> None:
        """Waits until the rank has loaded, or is ready; ModelLoadError with its own words where it could not."""
        if not self._connection.poll(START_TIMEOUT.total_seconds()):
            raise ModelLoadError(f"rank {self._rank} has not loaded within {START_TIMEOUT}")
        try:
            fault = self._connection.recv()
        except (EOFError, OSError):
            status = self._process.wait(STOP_SECONDS)
            raise ModelLoadError(f"rank {self._rank} ended while it loaded, with status {status}") from None
        if fault:
            raise ModelLoadError(f"rank {self._rank}: {fault}")

    def tell(self, words: tuple[object, ...]) -> None:
        """Hands over a step or another order."""
        try:
            self._connection.send(words)
        except OSError as error:
            raise EngineBroken(f"rank {self._rank} is gone, status {self._process.poll()}: {error}") from error

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Calls back when the process ends, unless it was told to."""

        def wait() -> None:
            status = self._process.wait()
            if not self._is_closing:
                on_broken(f"rank {self._rank} has ended, with status {status}")

        threading.Thread(target=wait, name=f"rank-{self._rank}-watch", daemon=True).start()

    def disconnect(self) -> None:
        """Lets the process leave, which it does when its connection ends."""
        self._is_closing = True
        self._connection.close()

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
