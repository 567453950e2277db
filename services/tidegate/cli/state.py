"""What a mesh writes down about itself, so that status, chat and the next start find it.

Everything lies under one folder (TIDEGATE_HOME, else `.tidegate` in the current folder):

    run/lock        held (flock) by the supervisor as long as it lives
    run/mesh.json   the mesh: addresses, processes, shared memory; replaced as a whole at every change
    run/            the rendered Envoy configuration, endpoints and Triton's backend
    logs/           one file a process
    cache/          weights in the engine's own form; survives restarts
    batch/          files and batches of the Batch API; survives restarts

Invariants: one supervisor a folder; mesh.json names every process (by pid and start time) and the prefixes of
all shared memory of the run before the first process starts, so that after `kill -9` the next start can end
what is left of it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from tidegate.cli import ports, process_table
from tidegate.cli.process_table import ProcessId

SHARED_MEMORY: Final = Path("/dev/shm")

ProcessState = Literal["starting", "ready", "restarting", "stopped"]
MeshPhase = Literal["starting", "ready", "stopping", "stopped"]


class ProcessRecord(msgspec.Struct, kw_only=True):
    """One process of the mesh."""

    name: str
    log: str
    state: ProcessState = "starting"
    pid: int = 0
    start_ticks: int = 0
    restart_count: int = 0
    last_error: str = ""

    @property
    def process(self) -> ProcessId:
        """The process, told apart from all others."""
        return ProcessId(pid=self.pid, start_ticks=self.start_ticks)


class Mesh(msgspec.Struct, kw_only=True):
    """A mesh, as mesh.json has it. Addresses are host:port."""

    run_id: str
    phase: MeshPhase = "starting"
    supervisor: ProcessId
    model_name: str
    model_path: str
    shared_memory_prefixes: list[str]
    """Every region of the run begins with one of them."""
    arena_region: str
    addresses: dict[str, str]
    """By the names of the ports: ingress, mesh, admin, scheduler, model-0, triton-0, scheduler-metrics, ..."""
    replica_count: int
    lite_replica_count: int = 0
    scheduler_count: int = 1
    lite_model_name: str = ""
    """Empty: there is no lite model."""
    lite_model_path: str = ""
    ingress_scheme: Literal["http", "https"] = "http"
    processes: list[ProcessRecord] = []

    @property
    def scheduler_addresses(self) -> tuple[str, ...]:
        """Of all schedulers, the first one first."""
        return tuple(self.addresses[name] for name in ports.scheduler_names(self.scheduler_count))

    @property
    def is_running(self) -> bool:
        """Whether its supervisor lives."""
        return self.supervisor.is_alive


class AlreadyRunning(Exception):
    """Another supervisor holds this folder; the message says which."""


class Home:
    """The state folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.logs = directory / "logs"
        self.cache = directory / "cache"
        self.batch = directory / "batch"
        self._lock: int | None = None

    @property
    def mesh_file(self) -> Path:
        """Where the mesh is written down."""
        return self.run / "mesh.json"

    def claim(self) -> None:
        """Makes this process the folder's only supervisor until it ends, however it ends.

        Raises:
            AlreadyRunning: another one is alive.
            OSError: the folder cannot be written.
        """
        for directory in (self.run, self.logs, self.cache):
            directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 64).decode(errors="replace").strip()
            os.close(lock)
            raise AlreadyRunning(
                f"a mesh runs here already (pid {holder or 'unknown'}, {self.directory}): stop it with Ctrl-C there or "
                f"`kill {holder}`, or give this one another folder with TIDEGATE_HOME"
            ) from None
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def release(self) -> None:
        """Lets another supervisor claim the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read(self) -> Mesh | None:
        """The mesh that was last written down; None when there is none or the file makes no sense."""
        try:
            return msgspec.json.decode(self.mesh_file.read_bytes(), type=Mesh)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, mesh: Mesh) -> None:
        """Replaces what is written down, in one step."""
        partial = self.mesh_file.with_suffix(".partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(mesh), indent=2))
        partial.replace(self.mesh_file)

    def clean_up(self) -> Leftovers:
        """Ends what an earlier supervisor left behind. The folder must be claimed.

        Raises:
            TimeoutError: a left-over process does not end.
        """
        assert self._lock is not None
        mesh = self.read()
        if mesh is None:
            return Leftovers()
        known = tuple(record.process for record in mesh.processes)
        process_count = process_table.end_all(mesh.run_id, known=known)
        regions = remove_shared_memory(mesh.shared_memory_prefixes)
        return Leftovers(process_count=process_count, region_count=len(regions))


class Leftovers(msgspec.Struct, frozen=True, kw_only=True):
    """What an earlier run had left behind."""

    process_count: int = 0
    region_count: int = 0

    def __bool__(self) -> bool:
        return bool(self.process_count or self.region_count)


def new_run_id() -> str:
    """A name for a run that no other has."""
    return secrets.token_hex(8)


def shared_memory(prefixes: Sequence[str]) -> list[Path]:
    """The regions of one run that exist now."""
    assert all(prefix.startswith("tidegate-") for prefix in prefixes), prefixes
    return sorted(path for prefix in prefixes for path in SHARED_MEMORY.glob(f"{prefix}*"))


def remove_shared_memory(prefixes: Sequence[str]) -> list[Path]:
    """Removes the regions of one run; the processes that had them must have ended."""
    regions = shared_memory(prefixes)
    for region in regions:
        region.unlink(missing_ok=True)
    return regions
