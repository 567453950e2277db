"""Runs the processes of a mesh: starts them, watches them, starts them again, and leaves nothing behind.

Each process has a process group of its own (so that a terminal's Ctrl-C reaches only the supervisor, and so that a
stop reaches what the process started), dies with the supervisor (PR_SET_PDEATHSIG), writes to a log file of its
own whose size is bounded, and is written down in mesh.json by pid and start time.

What it leaves to others: what the processes are (`processes.py`), when a restart makes sense (`restarts.py`), and
how things are told (the `Listener`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from tidegate.cli import process_table, state
from tidegate.cli.process_table import ProcessId
from tidegate.cli.restarts import GiveUp, RestartPolicy, describe_exit

STOP_SECONDS: Final = 6.0
"""From SIGTERM to SIGKILL; with what follows it a stop takes less than ten seconds."""

PROBE_INTERVAL_SECONDS: Final = 0.1
PROBE_TIMEOUT_SECONDS: Final = 2.0
WHOLE_INTERVAL_SECONDS: Final = 0.5

LONGEST_LOG_BYTES: Final = 16 * 1024 * 1024
"""Past it a log becomes NAME.log.1 and begins anew, so that each process keeps at most twice as much."""

LOG_CHECK_SECONDS: Final = 5.0
ERROR_TAIL_LINES: Final = 12
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process to run."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    """All of it; nothing is inherited."""
    is_ready: Callable[[], Awaitable[bool]]
    """Asks the process itself; may raise anything while it is not there yet."""
    is_whole: Callable[[int], bool] | None = None
    """Of a process (pid) that was ready: whether what it needs beside itself still lives. It is ended if not."""
    niceness: int = 0
    """Above 0 it leaves the processors to the others first (0 to 19)."""


class Listener(Protocol):
    """Whoever wants to know what happens to the processes."""

    def became_ready(self, name: str, seconds: float, restart_count: int) -> None:
        """The process answers, `seconds` after it was started."""

    def exited(self, name: str, how: str, delay_seconds: float) -> None:
        """The process ended by itself and is started again after the delay."""

    def gave_up(self, name: str, how: str, reason: str, tail: list[str]) -> None:
        """The process ended and is not started again; `tail` is the end of its log."""

    def broke(self, what: str, error: BaseException) -> None:
        """The supervisor itself failed at something that goes on as long as the mesh: the mesh must stop."""


@dataclass
class _Child:
    """One program's life here."""

    program: Program
    record: state.ProcessRecord
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    process: asyncio.subprocess.Process | None = None
    ever_ready: bool = False


class Supervisor:
    """Keeps the programs of one mesh running.

    Args:
        home: the claimed state folder.
        mesh: what is written down; the supervisor keeps its `processes` true.
    """

    def __init__(self, home: state.Home, mesh: state.Mesh, listener: Listener) -> None:
        self._home = home
        self._mesh = mesh
        self._listener = listener
        self._children: dict[str, _Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.failed = asyncio.Event()
        """Set when a process that the mesh cannot be without is given up, or is watched no more."""

    def start(self, programs: Sequence[Program]) -> None:
        """Starts all programs at once; they become ready in whatever order they do."""
        for program in programs:
            record = state.ProcessRecord(name=program.name, log=str(self.log_path(program.name)))
            self._children[program.name] = _Child(program, record)
            self._mesh.processes.append(record)
            begin_log(self.log_path(program.name))
        self._write()
        self._tasks = [
            self._watched(f"keeping {name} running", self._keep_running(child))
            for name, child in self._children.items()
        ]
        self._tasks.append(self._watched("bounding the logs", self._bound_logs()))

    def not_ready(self) -> list[str]:
        """The processes that do not answer yet (or any more)."""
        return [name for name, child in self._children.items() if child.record.state != "ready"]

    def log_path(self, name: str) -> Path:
        """The log of a process."""
        return self._home.logs / f"{name}.log"

    async def stop(self) -> None:
        """Stops everything within STOP_SECONDS and a little; afterwards no process of the run is left."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        living = [child.process for child in self._children.values() if child.process and _is_running(child.process)]
        for process in living:
            _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.gather(*(process.wait() for process in living))
        for process in living:
            if _is_running(process):
                _signal_group(process.pid, signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in living))
        await asyncio.to_thread(process_table.end_all, self._mesh.run_id)
        for child in self._children.values():
            child.record.state = "stopped"
        self._write()

    def _watched(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose failure is told and ends the mesh, because nobody awaits it before the stop."""
        task = asyncio.create_task(work, name=what)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._stopping:
            self.failed.set()
            self._listener.broke(task.get_name(), error)

    async def _keep_running(self, child: _Child) -> None:
        """One program, for as long as the mesh runs."""
        while True:
            started_at = time.monotonic()
            exit_code = await self._run_once(child, started_at)
            how = describe_exit(exit_code)
            decision = child.policy.after_exit(
                exit_code=exit_code, ran_seconds=time.monotonic() - started_at, was_ready=child.ever_ready
            )
            tail = last_lines(self.log_path(child.program.name), ERROR_TAIL_LINES)
            child.record.last_error = f"ended: {how}"
            await asyncio.to_thread(process_table.end_group, self._mesh.run_id, child.record.pid)
            if isinstance(decision, GiveUp):
                child.record.state = "stopped"
                self._write()
                self._listener.gave_up(child.program.name, how, decision.reason, tail)
                self.failed.set()
                return
            child.record.state = "restarting"
            child.record.restart_count += 1
            self._write()
            self._listener.exited(child.program.name, how, decision.delay_seconds)
            await asyncio.sleep(decision.delay_seconds)

    async def _run_once(self, child: _Child, started_at: float) -> int:
        """Starts the program, says when it is ready, and answers its exit code."""
        child.process = await self._spawn(child)
        process_id = ProcessId.of(child.process.pid)
        child.record.pid, child.record.start_ticks = process_id.pid, process_id.start_ticks
        child.record.state = "starting"
        self._write()
        probing = self._watched(f"watching {child.program.name}", self._probe_until_ready(child, started_at))
        try:
            return await child.process.wait()
        finally:
            probing.cancel()

    async def _spawn(self, child: _Child) -> asyncio.subprocess.Process:
        supervisor = os.getpid()

        def die_with_supervisor() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(1)
            os.nice(child.program.niceness)

        environment = {**child.program.environment, process_table.RUN_ID_VARIABLE: self._mesh.run_id}
        with self.log_path(child.program.name).open("ab") as log:
            try:
                return await asyncio.create_subprocess_exec(
                    *child.program.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    process_group=0,
                    preexec_fn=die_with_supervisor,
                )
            except OSError as error:
                log.write(f"cannot start {child.program.argv[0]}: {error}\n".encode())
        missing = [sys.executable, "-c", f"raise SystemExit({127})"]
        return await asyncio.create_subprocess_exec(*missing, env=environment)

    async def _probe_until_ready(self, child: _Child, started_at: float) -> None:
        """Asks the process until it answers; what it says before that means nothing."""
        while True:
            ready = False
            with contextlib.suppress(Exception):
                async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                    ready = await child.program.is_ready()
            if ready:
                break
            await asyncio.sleep(PROBE_INTERVAL_SECONDS)
        child.ever_ready = True
        child.record.state = "ready"
        self._write()
        self._listener.became_ready(child.program.name, time.monotonic() - started_at, child.record.restart_count)
        if child.program.is_whole is not None:
            await self._end_when_not_whole(child, child.program.is_whole)

    async def _end_when_not_whole(self, child: _Child, is_whole: Callable[[int], bool]) -> None:
        """Watches a process that goes on without a part of itself and says nothing; its end is a crash like others."""
        assert child.process is not None
        if not is_whole(child.process.pid):
            return  # It says it can work: then what is looked for cannot be seen here.
        while is_whole(child.process.pid):
            await asyncio.sleep(WHOLE_INTERVAL_SECONDS)
        _signal_group(child.process.pid, signal.SIGKILL)

    async def _bound_logs(self) -> None:
        """Keeps each log file below its bound; the processes append, so cutting the file under them is safe."""
        while True:
            await asyncio.sleep(LOG_CHECK_SECONDS)
            for name in self._children:
                await asyncio.to_thread(bound_log, self.log_path(name), LONGEST_LOG_BYTES)

    def _write(self) -> None:
        self._home.write(self._mesh)


def begin_log(path: Path) -> None:
    """A new log; that of the run before stays as NAME.log.1."""
    if path.exists():
        path.replace(path.with_name(path.name + ".1"))
    path.touch()


def bound_log(path: Path, longest_bytes: int) -> None:
    """Moves the content of a log that is too long to NAME.log.1."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > longest_bytes:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            os.truncate(path, 0)


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log, without empty lines."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


def _is_running(process: asyncio.subprocess.Process) -> bool:
    return process.returncode is None


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
