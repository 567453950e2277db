"""What a process's allocator is told, and what is let go after a peak."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from tidegate.common import memory

LIBRARY = Path("/lib/libmimalloc.so.3")


def test_the_library_is_where_its_package_puts_it():
    assert memory.mimalloc_library().name == "libmimalloc.so.3"


def test_without_the_library_an_environment_stays_as_it_is():
    assert memory.with_mimalloc({"PATH": "/bin"}, None) == {"PATH": "/bin"}


def test_with_the_library_pythons_small_objects_go_there_too():
    environment = memory.with_mimalloc({"PATH": "/bin"}, LIBRARY)
    assert (environment["PATH"], environment["LD_PRELOAD"]) == ("/bin", str(LIBRARY))
    assert environment["PYTHONMALLOC"] == "malloc"


def test_what_an_environment_says_of_the_allocator_goes_before():
    said = {"LD_PRELOAD": "/lib/libother.so", "PYTHONMALLOC": "debug", "MIMALLOC_PURGE_DELAY": "7"}
    environment = memory.with_mimalloc(said, LIBRARY)
    assert environment["LD_PRELOAD"] == f"/lib/libother.so:{LIBRARY}"
    assert (environment["PYTHONMALLOC"], environment["MIMALLOC_PURGE_DELAY"]) == ("debug", "7")


@pytest.mark.parametrize(("library", "expected"), [(memory.mimalloc_library(), "True"), (None, "False")])
def test_a_process_knows_whether_it_has_it(library, expected):
    program = "from tidegate.common import memory; print(memory.has_mimalloc())"
    environment = memory.with_mimalloc({"PATH": os.environ["PATH"]}, library)
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == expected


async def kept_objects():
    """Where the objects lie that asyncio and uvloop keep to use them again: the next ones that are asked for."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    timers = [loop.call_later(60, int) for _ in range(200)]
    waits = [future.__await__() for _ in range(200)]
    found = {id(one) for one in (*timers, *waits)}
    while timers:
        timers.pop().cancel()
    await asyncio.sleep(0.01)
    return found


@pytest.mark.parametrize(("lets_go", "fewest", "most"), [(False, 390, 400), (True, 0, 10)])
def test_objects_that_are_kept_for_use_are_replaced(lets_go, fewest, most):
    async def still_kept():
        for _ in range(2):
            kept = await kept_objects()
        if lets_go:
            await memory.release()
        return len(kept & await kept_objects())

    assert fewest <= uvloop.run(still_kept()) <= most
