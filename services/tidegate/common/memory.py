"""The memory that a peak leaves behind in a process, and how it goes back to the system.

What a peak took is in pieces, and an allocator gives back only what is free as a whole: Python's own a MiB, mimalloc
64 KiB. So little that lives on may lie among what goes. Two things do that nobody holds: names in Python's cache of
attributes, and objects that asyncio and uvloop keep to use them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Final

LIBRARY: Final = Path("cmeel.prefix/lib/libmimalloc.so.3")
"""Where the package cmeel-mimalloc puts it, below the environment's packages."""

KEPT_OBJECTS: Final = 256
"""At least as many as asyncio (255) and uvloop (250) keep of a kind."""

FAR_SECONDS: Final = 3600.0
"""Longer than a timer lives that only takes a place."""

_OPTIONS: Final = {
    # Python's small objects, too, or it would still hold a MiB for each that lives on.
    "PYTHONMALLOC": "malloc",
    # A page of 2 MiB is given back as a whole or not at all.
    "MIMALLOC_ALLOW_THP": "0",
    "MIMALLOC_PURGE_DELAY": "100",
}


def mimalloc_library() -> Path | None:
    """mimalloc's shared library; None where its package is not installed."""
    path = Path(sysconfig.get_path("purelib")) / LIBRARY
    return path if path.is_file() else None


def with_mimalloc(environment: Mapping[str, str], library: Path | None) -> dict[str, str]:
    """The environment of a process that is to use mimalloc; as it was where there is no library.

    What the environment itself says of the allocator goes before.
    """
    if library is None:
        return dict(environment)
    preload = ":".join(filter(None, (environment.get("LD_PRELOAD", ""), str(library))))
    return {**_OPTIONS, **environment, "LD_PRELOAD": preload}


def has_mimalloc() -> bool:
    """Whether this process uses mimalloc."""
    return hasattr(ctypes.CDLL(None), "mi_version") and os.environ.get("PYTHONMALLOC") == "malloc"


async def release() -> None:
    """Gives back to the system what a peak has left behind; takes some milliseconds, so for a quiet moment."""
    await _renew_kept_objects()
    sys._clear_type_cache()  # The names in it are whatever strings were asked with.
    gc.collect()
    own = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        own.mi_collect(True)
    with contextlib.suppress(AttributeError):  # Only glibc has it.
        own.malloc_trim(0)


async def _renew_kept_objects() -> None:
    """Puts new objects in the place of those that are kept for use, which lie where the peak was.

    What is kept is taken, then new ones are made. The new ones are let go first, and so kept; the others are freed.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    kept_waits, new_waits = ([future.__await__() for _ in range(KEPT_OBJECTS)] for _ in range(2))
    del new_waits
    del kept_waits
    kept_timers, new_timers = ([loop.call_later(FAR_SECONDS, int) for _ in range(KEPT_OBJECTS)] for _ in range(2))
    for timers in (new_timers, kept_timers):
        while timers:
            timers.pop().cancel()
        await asyncio.sleep(0)  # uvloop lets go of a timer once the loop comes round.
        await asyncio.sleep(0)
