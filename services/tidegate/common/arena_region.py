"""The file that an arena lives in: its name, layout, lock and creation, and the arena's errors.

The file is made complete under another name and then renamed, so nobody ever maps half a region; it is never
resized, because a process that touches a page that was cut off is killed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np

SHARED_MEMORY_FOLDER: Final = Path("/dev/shm")
MAGIC: Final = int.from_bytes(b"TIDEGATE", "little")
LAYOUT_VERSION: Final = 1
HEADER_BYTES: Final = mmap.PAGESIZE
ENTRY_WORDS: Final = 8
ENTRY_BYTES: Final = ENTRY_WORDS * 8

MOST_LEASES: Final = 16_384
"""The bound on live leases; above the requests that a host may have in flight."""

BYTES_PER_LEASE: Final = 4_096
"""The table has a lease for so many bytes of the region: about a thousand tokens."""

LEAST_LEASES: Final = 16
SMALLEST_REGION_BYTES: Final = 64 * 1024

WORD_BYTES: Final = 8
_HEADER_FIELDS: Final = 5
LARGEST_GENERATION: Final = 1 << 48
"""Far more than a slot can be used; a table that says more is not ours."""

GENERATION, OFFSET, LENGTH, EXPIRY, RELEASED, RENEWED = range(6)
"""The words of a lease's entry; the last two are the readers'."""


class ArenaError(Exception):
    """The arena cannot do what was asked."""


class ArenaUnavailable(ArenaError):
    """There is no usable region of this name, or another process writes to it."""


class HandleError(ArenaError):
    """The handle does not give its bytes: prepare them anew."""


class StaleHandle(HandleError):
    """The lease ended or never was, or the handle does not fit the region."""


class ForeignHandle(HandleError):
    """The handle is of another host or region."""


class CorruptHandle(HandleError):
    """The header is no tensor."""


@functools.cache
def host_id() -> str:
    """Names this boot of this host and its shared memory: two processes with the same id see the same regions.

    Containers of one host see one another's regions only if they share /dev/shm, so its device is part of the id.
    """
    parts = [_text_of("/etc/machine-id"), _text_of("/proc/sys/kernel/random/boot_id")]
    parts.append(str(os.stat(SHARED_MEMORY_FOLDER).st_dev))
    try:
        # A time namespace of its own shifts CLOCK_MONOTONIC, and expiries would mean something else there.
        parts.append(os.readlink("/proc/self/ns/time"))
    except OSError:
        parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def lease_limit(byte_count: int) -> int:
    """How many leases a region of this size has room for."""
    return max(LEAST_LEASES, min(MOST_LEASES, byte_count // BYTES_PER_LEASE))


def unlink(region: str) -> None:
    """Removes the region's name; who has it mapped keeps it. For tests and the end of a mesh."""
    region_path(region).unlink(missing_ok=True)


def region_path(region: str) -> Path:
    """The region's file; raises ArenaUnavailable for a name that cannot be one."""
    if not region or "/" in region or region.startswith("."):
        raise ArenaUnavailable(f"{region!r} cannot be the name of a region: one word, no slash, no leading dot")
    return SHARED_MEMORY_FOLDER / region


def lock_existing(path: Path) -> int | None:
    """A locked descriptor of the region, or None when there is none; raises ArenaUnavailable when it has a writer."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        _lock(descriptor, path)
        # Between open and lock, the last writer may have put another file in its place.
        if path.exists() and os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ArenaUnavailable(f"{path} has a writer already: one process of a host writes to an arena") from error


def create_region(path: Path, byte_count: int) -> int:
    """A new, locked region under the name. It gets the name when it is complete, so no reader sees half of it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Reserved now: a page that is missing later would kill the process that touches it.
        os.posix_fallocate(descriptor, 0, byte_count)
        count = lease_limit(byte_count)
        header = [MAGIC, LAYOUT_VERSION, byte_count, count, HEADER_BYTES + count * ENTRY_BYTES]
        table = np.zeros((count, ENTRY_WORDS), np.uint64)
        # A random beginning, so that handles of a region that was replaced fit nothing in this one.
        table[:, GENERATION] = 2 * int.from_bytes(os.urandom(4), "little")
        os.pwrite(descriptor, np.array(header, np.uint64).tobytes(), 0)
        os.pwrite(descriptor, table.tobytes(), HEADER_BYTES)
        os.rename(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


def open_to_read(region: str) -> int:
    """A descriptor of the region; raises ArenaUnavailable when there is none of this layout.

    Opened for writing too: a reader stores to its lease's two words.
    """
    path = region_path(region)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ArenaUnavailable(f"{path}: {error.strerror}") from error
    fault = layout_fault(descriptor)
    if fault is not None:
        os.close(descriptor)
        raise ArenaUnavailable(f"{path}: {fault}")
    return descriptor


def layout_fault(descriptor: int) -> str | None:
    """What is wrong with the file's header; None when it is a region of this layout."""
    size = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, _HEADER_FIELDS * WORD_BYTES, 0)
    if len(raw) < _HEADER_FIELDS * WORD_BYTES or size < SMALLEST_REGION_BYTES:
        return f"is no arena: it has {size} bytes"
    magic, version, byte_count, leases, data_offset = np.frombuffer(raw, np.uint64).tolist()
    if magic != MAGIC or version != LAYOUT_VERSION:
        return "is no arena of this version"
    limit = lease_limit(size)
    if (byte_count, leases, data_offset) != (size, limit, HEADER_BYTES + limit * ENTRY_BYTES):
        return f"its header says {byte_count} bytes and {leases} leases, the file has {size}"
    return None


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
