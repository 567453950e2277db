"""Processes of this machine, told apart for certain: by pid and start time, or by the mark in their environment.

A pid alone may belong to somebody else by now, so nothing here ends a process by pid or by name alone.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Final

import msgspec

RUN_ID_VARIABLE: Final = "TIDEGATE_RUN_ID"
"""Every process of a mesh carries the mesh's run id in its environment, and so do all that it starts."""

_START_TIME_FIELD: Final = 19
"""Of /proc/PID/stat, counted after the name: the start in clock ticks since the boot."""


class ProcessId(msgspec.Struct, frozen=True):
    """One process and no other."""

    pid: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """Whether exactly this process still runs."""
        return self.start_ticks != 0 and start_ticks(self.pid) == self.start_ticks

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process that has this pid now."""
        return cls(pid=pid, start_ticks=start_ticks(pid))


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since the boot; 0 when there is none or it is dead already."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat[stat.rindex(b")") + 2 :].split()
    return 0 if fields[0] in {b"Z", b"X"} else int(fields[_START_TIME_FIELD])


def with_run_id(run_id: str) -> list[ProcessId]:
    """All living processes that carry this run id, whoever their parents are by now; never this one."""
    assert run_id
    mark = f"{RUN_ID_VARIABLE}={run_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if mark in environment.split(b"\0"):
            process = ProcessId.of(int(entry.name))
            if process.start_ticks:
                found.append(process)
    return found


def end_all(run_id: str, *, known: tuple[ProcessId, ...] = (), timeout_seconds: float = 5.0) -> int:
    """Kills every process of a run and waits until they are gone; answers how many there were.

    Args:
        known: processes that were recorded by pid and start time, beside those that carry the run id.

    Raises:
        TimeoutError: some are still there after the time-out, in a system call that cannot be interrupted.
    """
    ended: set[ProcessId] = set()
    deadline = time.monotonic() + timeout_seconds
    while True:
        living = {process for process in (*known, *with_run_id(run_id)) if process.is_alive}
        if not living:
            return len(ended)
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in living)
            raise TimeoutError(f"left-over processes do not end: {pids}")
        for process in living:
            _kill(process)
        ended |= living
        time.sleep(0.02)


def end_group(run_id: str, group: int) -> None:
    """Kills what a process that ended had started in its group (Triton's stubs), and nothing outside the run."""
    for process in with_run_id(run_id):
        try:
            if os.getpgid(process.pid) == group:
                _kill(process)
        except ProcessLookupError:
            continue


def _kill(process: ProcessId) -> None:
    """Kills exactly this process: the descriptor is opened before the start time is compared."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        if process.is_alive:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(descriptor)
