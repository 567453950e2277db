"""How much memory there is, and what it means when there is not enough."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ModelLoadError

_CGROUP_BOUND = Path("/sys/fs/cgroup/memory.max")


def machine_bytes() -> int:
    """The machine's memory, or this container's bound where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(_CGROUP_BOUND.read_text()))
    except (OSError, ValueError):  # No cgroup of version 2, or "max".
        return physical


@contextmanager
def enough_memory_for(what: str) -> Iterator[None]:
    """What torch raises where memory is short, as a ModelLoadError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise ModelLoadError(f"{what} cannot be held in memory: {error}") from error
