"""Whether a mesh can run here: each fact judged by itself, with a one-line reason and a one-line fix.

Pure: the facts come in. `up` refuses to start on the checks that fail, `doctor` shows all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from tidegate.cli.machine import LIBPYTHON, Machine

MEBIBYTE: Final = 1 << 20
GIBIBYTE: Final = 1 << 30

BASE_MEMORY_BYTES: Final = GIBIBYTE
"""Envoy and the services of a small mesh."""

REPLICA_MEMORY_BYTES: Final = 7 * GIBIBYTE // 4
"""A Triton with the default model, its KV blocks, and its model service."""

OWN_MODEL_FACTOR: Final = 2.5
OWN_MODEL_MEMORY_BYTES: Final = GIBIBYTE
"""A replica with another model holds about so many times the model's files (the weights, and once more while they are
loaded and packed), and this for its KV blocks and the processes."""

REPLICA_SHARED_MEMORY_BYTES: Final = 64 * MEBIBYTE
"""What Triton's Python backend moves requests and answers through."""

WANTED_OPEN_FILES: Final = 20_000
"""Two for each of 10,000 clients at once."""

Outcome = Literal["ok", "warning", "failed"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    group: str
    name: str
    outcome: Outcome = "ok"
    reason: str = ""
    """One line; for an outcome of ok, the fact itself."""
    fix: str = ""
    """One line; empty for ok."""


def passed(group: str, name: str, reason: str) -> Check:
    """A check that holds."""
    return Check(group=group, name=name, reason=reason)


def failed(group: str, name: str, reason: str, fix: str) -> Check:
    """A check that does not."""
    return Check(group=group, name=name, outcome="failed", reason=reason, fix=fix)


def check_machine(machine: Machine, *, model_bytes: Sequence[int | None], arena_bytes: int) -> list[Check]:
    """Whether the machine can carry a mesh of this size.

    Args:
        model_bytes: the size of the model's files, once a replica; None is the default model.
    """
    return [
        _check_platform(machine),
        _check_python(machine),
        _check_libpython(machine),
        _check_memory(machine, model_bytes),
        _check_shared_memory(machine, len(model_bytes), arena_bytes),
        _check_open_files(machine),
    ]


def summary(checks: Sequence[Check]) -> str:
    """The checks in one line."""
    count = len(failures(checks))
    if not count:
        return "all checks hold"
    return "1 check fails" if count == 1 else f"{count} checks fail"


def failures(checks: Sequence[Check]) -> list[Check]:
    """Those that keep a mesh from running."""
    return [check for check in checks if check.outcome == "failed"]


def _check_platform(machine: Machine) -> Check:
    found = f"{machine.system} on {machine.architecture}, {machine.processor_count} processors"
    if (machine.system, machine.architecture) == ("Linux", "x86_64"):
        return passed("machine", "platform", found)
    return failed("machine", "platform", found, "run on Linux on x86_64: Envoy and Triton come for it alone")


def _check_python(machine: Machine) -> Check:
    found = "Python {}.{}".format(*machine.python_version)
    if machine.python_version == (3, 11):
        return passed("machine", "python", found)
    return failed("machine", "python", found, "use Python 3.11: make PYTHON=/path/to/python3.11 run")


def _check_libpython(machine: Machine) -> Check:
    if machine.libpython:
        return passed("machine", "libpython", machine.libpython)
    reason = f"{LIBPYTHON} was not found; Triton's Python backend is linked with it"
    return failed("machine", "libpython", reason, "install libpython3.11 (Debian: apt install libpython3.11)")


def replica_memory_bytes(model_bytes: int | None) -> int:
    """What one replica needs; None is the default model."""
    if model_bytes is None:
        return REPLICA_MEMORY_BYTES
    return int(OWN_MODEL_FACTOR * model_bytes) + OWN_MODEL_MEMORY_BYTES


def _check_memory(machine: Machine, model_bytes: Sequence[int | None]) -> Check:
    replica_count = len(model_bytes)
    needed = BASE_MEMORY_BYTES + sum(replica_memory_bytes(each) for each in model_bytes)
    found = f"{_size(machine.memory_available_bytes)} available, {_size(needed)} needed for {_replicas(replica_count)}"
    if machine.memory_available_bytes >= needed:
        return passed("machine", "memory", found)
    fix = "free some memory" + (", or run fewer replicas with --replicas" if replica_count > 1 else "")
    return failed("machine", "memory", found, fix)


def _check_shared_memory(machine: Machine, replica_count: int, arena_bytes: int) -> Check:
    needed = arena_bytes + replica_count * REPLICA_SHARED_MEMORY_BYTES
    free = machine.shared_memory_free_bytes
    found = f"{_size(free)} free in /dev/shm, {_size(needed)} needed for {_replicas(replica_count)}"
    if free >= needed:
        return passed("machine", "shared memory", found)
    wanted = f"{2 * needed // MEBIBYTE}m"
    fix = f"make /dev/shm larger: mount -o remount,size={wanted} /dev/shm (Docker: --shm-size={wanted})"
    return failed("machine", "shared memory", found, fix)


def _check_open_files(machine: Machine) -> Check:
    found = f"{machine.open_file_limit} open files allowed"
    if machine.open_file_limit >= WANTED_OPEN_FILES:
        return passed("machine", "open files", found)
    return Check(
        group="machine",
        name="open files",
        outcome="warning",
        reason=f"{found}; 10,000 clients at once need {WANTED_OPEN_FILES}",
        fix=f"ulimit -Hn {WANTED_OPEN_FILES}",
    )


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count} replicas"


def _size(byte_count: int) -> str:
    if byte_count >= 10 * GIBIBYTE:
        return f"{byte_count // GIBIBYTE} GiB"
    if byte_count >= GIBIBYTE:
        return f"{byte_count / GIBIBYTE:.1f} GiB"
    return f"{max(0, byte_count) // MEBIBYTE} MiB"
