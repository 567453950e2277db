"""The processes that generate load, started once and used for many runs.

Invariants: all workers of a run connect before any of them begins, and begin at the same moment; a worker whose input
ends, ends, so none outlives this process, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tidegate.bench import job
from tidegate.bench.ledger import Record, WorkerFigures, merged
from tidegate.bench.plan import Plan
from tidegate.bench.sender import Progress, Share
from tidegate.bench.targets import Target

START_SECONDS: Final = 30.0
"""From a job to the worker's word that it is connected."""

LEAD_SECONDS: Final = 0.1
"""From the last worker's Ready to the plan's time 0."""

STOP_SECONDS: Final = 10.0
"""From the word to stop to the records, and from the end of its input to the worker's own end."""

LARGEST_FRAME_BYTES: Final = 1 << 30

GROUP_NICENESS: Final = -10
"""Of each worker's session: on the machine of the server under test a worker goes first, as if on one of its own. Else,
the server would take the processor from those who say how late it is."""

OnProgress = Callable[[Progress], None]


class WorkerFailed(Exception):
    """A worker could not do its part; the message says why."""


class Workers:
    """So many generating processes, as an asynchronous context.

    Args:
        count: processes; one keeps one processor core busy at most.
    """

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        source_root = str(Path(__file__).resolve().parents[2])
        search = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": search}
        for _ in range(self._count):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tidegate.bench.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
                limit=LARGEST_FRAME_BYTES,
                # Ctrl-C is for the one who asked; the workers are told by him.
                start_new_session=True,
            )
            self._processes.append(process)
            _let_go_first(process.pid)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(_end(process) for process in self._processes))
        self._processes.clear()

    async def run(
        self,
        plan: Plan,
        target: Target,
        *,
        on_begin: Callable[[float], None] | None = None,
        on_progress: OnProgress | None = None,
        stop: asyncio.Event | None = None,
    ) -> tuple[list[Record], list[WorkerFigures]]:
        """Runs a plan against a target.

        Args:
            on_begin: told the moment of the plan's time 0, on the monotonic clock.
            on_progress: told how far all workers together are, a few times a second.
            stop: when set, ends early; what was sent is in the records.

        Raises:
            WorkerFailed: the target does not answer, or a worker died.
        """
        together = _Together(self._count, on_progress)
        for index, process in enumerate(self._processes):
            await _send(process, job.Job(plan, target, Share(index, self._count)))
        await asyncio.gather(*(_ready(process) for process in self._processes))
        begins_at = time.monotonic() + LEAD_SECONDS
        if on_begin is not None:
            on_begin(begins_at)
        for process in self._processes:
            await _send(process, job.Begin(begins_at))
        stopper = asyncio.create_task(self._stop_when(stop)) if stop is not None else None
        try:
            done = await asyncio.gather(
                *(_until_done(process, index, together) for index, process in enumerate(self._processes))
            )
        finally:
            if stopper is not None:
                stopper.cancel()
        return merged(each.records for each in done), [each.figures for each in done]

    async def _stop_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        for process in self._processes:
            await _send(process, job.Stop())


class _Together:
    """All workers' progress as one."""

    def __init__(self, count: int, on_progress: OnProgress | None) -> None:
        self._parts = [Progress() for _ in range(count)]
        self._on_progress = on_progress

    def take(self, index: int, progress: Progress) -> None:
        self._parts[index] = progress
        if self._on_progress is None or index:
            return
        outcomes: Counter[str] = Counter()
        for part in self._parts:
            outcomes.update(part.outcomes)
        self._on_progress(
            Progress(
                planned=sum(part.planned for part in self._parts),
                sent=sum(part.sent for part in self._parts),
                in_flight=sum(part.in_flight for part in self._parts),
                tokens=sum(part.tokens for part in self._parts),
                outcomes=dict(outcomes),
                lag_seconds=max(part.lag_seconds for part in self._parts),
            )
        )


async def _send(process: asyncio.subprocess.Process, message: job.ToWorker) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(job.frame(message))
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError) as error:
        raise WorkerFailed(f"a worker of the load generator is gone: {error}") from error


async def _receive(process: asyncio.subprocess.Process) -> job.FromWorker:
    assert process.stdout is not None
    try:
        message = job.from_worker.decode(await job.read_frame(process.stdout))
    except asyncio.IncompleteReadError:
        raise WorkerFailed(f"a worker of the load generator ended with status {await process.wait()}") from None
    if isinstance(message, job.Broken):
        raise WorkerFailed(message.message)
    return message


async def _ready(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(START_SECONDS):
            while not isinstance(await _receive(process), job.Ready):
                pass
    except TimeoutError:
        raise WorkerFailed(f"a worker of the load generator is not ready within {START_SECONDS:.0f} s") from None


async def _until_done(process: asyncio.subprocess.Process, index: int, together: _Together) -> job.Done:
    while True:
        message = await _receive(process)
        if isinstance(message, job.Done):
            return message
        if isinstance(message, job.Moved):
            together.take(index, message.progress)


def _let_go_first(pid: int) -> None:
    """Where the kernel divides processors by session (sched(7), autogroup) and we may say so."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(GROUP_NICENESS), encoding="ascii")


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
