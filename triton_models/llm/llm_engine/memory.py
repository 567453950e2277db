"""How much memory there is, and what it means when there is not enough."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ModelLoadError

# What torch says where it gets none: of the machine's, of a GPU's, of a mapped file.
_SHORTAGES = ("allocate memory", "out of memory", "not enough memory")
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def machine_bytes() -> int:
    """The machine's memory, or this container's bound where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int((_CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # No cgroup of version 2, or "max".
        return physical


def free_bytes() -> int:
    """What of it is free, or holds nothing but files that can be read again."""
    free = machine_bytes()
    with suppress(OSError, LookupError, ValueError):
        free = min(free, 1024 * int(_field(_MEMINFO, "MemAvailable:")))
    with suppress(OSError, LookupError, ValueError):
        used = int((_CGROUP / "memory.current").read_text()) - int(_field(_CGROUP / "memory.stat", "inactive_file"))
        free = min(free, int((_CGROUP / "memory.max").read_text()) - used)
    return free


def _field(path: Path, name: str) -> str:
    fields = dict(line.split()[:2] for line in path.read_text().splitlines())
    return fields[name]


@contextmanager
def enough_memory_for(what: str) -> Iterator[None]:
    """What torch raises where memory is short, as a ModelLoadError; nothing else that it raises."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in _SHORTAGES):
            raise
        raise ModelLoadError(f"{what} cannot be held in memory: {error}") from error
