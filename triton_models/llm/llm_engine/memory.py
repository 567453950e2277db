"""How much memory there is, and what it means when there is not enough."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ModelLoadError

# What torch says where it gets none: of the machine's, of a GPU's, of a mapped file.
_SHORTAGES = ("allocate memory", "out of memory", "not enough memory")
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
    """What torch raises where memory is short, as a ModelLoadError; nothing else that it raises."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in _SHORTAGES):
            raise
        raise ModelLoadError(f"{what} cannot be held in memory: {error}") from error
