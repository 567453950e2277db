"""The arena across real processes that are killed at any point: what was promised stays, and nothing is corrupt."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.common.arena import Arena, StaleHandle, unlink
from tidegate.v1 import tensor_pb2

PROCESSES = Path(__file__).with_name("arena_processes.py")
REGION_BYTES = 4 << 20
KEPT_COUNT = 20
"""Both as the processes have them."""


@pytest.fixture
def region() -> Iterator[str]:
    name = f"tidegate-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield name
    unlink(name)


def start(role: str, region: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROCESSES), role, region], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def next_handle(process: subprocess.Popen[str]) -> tuple[int, tensor_pb2.SharedMemoryHandle]:
    assert process.stdout is not None
    number, encoded = process.stdout.readline().split()
    return int(number), tensor_pb2.SharedMemoryHandle.FromString(bytes.fromhex(encoded))


def check_contents(arena: Arena, number: int, handle: tensor_pb2.SharedMemoryHandle) -> None:
    data = arena.read(handle, time.monotonic())
    assert data == number.to_bytes(8, "little") * (handle.byte_count // 8)


def test_what_a_killed_writer_leased_stays_and_its_successor_goes_on(region: str) -> None:
    kept: list[tuple[int, tensor_pb2.SharedMemoryHandle]] = []
    for life in range(6):
        process = start("writer", region)
        try:
            kept += [next_handle(process) for _ in range(KEPT_COUNT)]
            # Long enough for thousands of writes, and of another length each time.
            time.sleep(0.05 + 0.0137 * life)
            assert process.poll() is None
        finally:
            kill(process)
        successor = Arena.open(region, REGION_BYTES)
        for number, handle in kept:
            check_contents(successor, number, handle)
        places = sorted((handle.byte_offset, handle.byte_count) for _, handle in kept)
        assert all(offset + count <= after for (offset, count), (after, _) in itertools.pairwise(places))
        # At most one piece a life: the one that was written and not yet released when it died.
        assert 0 <= successor.usage(time.monotonic()).lease_count - len(kept) <= life + 1
        successor.close()
    last = Arena.open(region, REGION_BYTES)
    usage = last.usage(time.monotonic() + 1000)
    assert (usage.lease_count, usage.free_byte_count) == (0, usage.byte_count)
    last.close()


def test_a_reader_beside_a_running_writer_sees_whole_pieces_or_a_stale_handle(region: str) -> None:
    """The writer reuses the bytes of what is released at once, so that copies race with it."""
    process = start("writer", region)
    reader: Arena | None = None
    try:
        kept = [next_handle(process) for _ in range(KEPT_COUNT)]
        reader = Arena.attach(region)
        for number, handle in kept:
            for _ in range(50):
                check_contents(reader, number, handle)
            assert reader.release(handle)
            with pytest.raises(StaleHandle):
                reader.read(handle, time.monotonic())
    finally:
        kill(process)
        if reader is not None:
            reader.close()


def test_a_reader_killed_while_it_releases_and_renews_leaves_a_region_that_works(region: str) -> None:
    writer = Arena.open(region, REGION_BYTES)
    number = 0
    for lines in (1, 5, 23):
        process = start("reader", region)
        assert process.stdin is not None and process.stdout is not None
        try:
            for _ in range(40):
                number += 1
                data = number.to_bytes(8, "little") * 100
                handle = writer.write(data, lease_seconds=60, now=time.monotonic())
                assert handle is not None
                process.stdin.write(f"{number} {handle.SerializeToString().hex()}\n")
            process.stdin.flush()
            for _ in range(lines):
                assert process.stdout.readline().split()[1] == "True"
        finally:
            kill(process)
        usage = writer.usage(time.monotonic())
        assert usage.byte_count - usage.free_byte_count == usage.lease_count * 832
    usage = writer.usage(time.monotonic() + 1000)
    assert (usage.lease_count, usage.free_byte_count) == (0, usage.byte_count)
    writer.close()
