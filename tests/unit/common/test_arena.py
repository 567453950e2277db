"""The arena: leases live as long as they were promised, and no handle, however wrong, reads what is not its own."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tidegate.common.arena import (
    Arena,
    ArenaError,
    ArenaUnavailable,
    CorruptHandle,
    ForeignHandle,
    HandleError,
    StaleHandle,
    decode_tensor_header,
    encode_tensor_header,
    host_id,
    unlink,
)
from tidegate.common.arena_region import HEADER_BYTES, SHARED_MEMORY_FOLDER
from tidegate.v1 import tensor_pb2

SIZE = 256 * 1024
NOW = 1000.0


@pytest.fixture
def region() -> Iterator[str]:
    name = f"tidegate-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield name
    unlink(name)


@pytest.fixture
def writer(region: str) -> Iterator[Arena]:
    arena = Arena.open(region, SIZE)
    yield arena
    arena.close()


@pytest.fixture
def reader(region: str, writer: Arena) -> Iterator[Arena]:
    arena = Arena.attach(region)
    yield arena
    arena.close()


def write(arena: Arena, data: bytes, *, lease_seconds: float = 10.0, now: float = NOW) -> tensor_pb2.SharedMemoryHandle:
    handle = arena.write(data, lease_seconds=lease_seconds, now=now)
    assert handle is not None
    return handle


def changed(handle: tensor_pb2.SharedMemoryHandle, **fields: Any) -> tensor_pb2.SharedMemoryHandle:
    copy = tensor_pb2.SharedMemoryHandle()
    copy.CopyFrom(handle)
    copy.MergeFrom(tensor_pb2.SharedMemoryHandle(**fields))
    return copy


def fill(arena: Arena, piece_bytes: int, *, lease_seconds: float = 10.0) -> list[tensor_pb2.SharedMemoryHandle]:
    handles = []
    while (handle := arena.write(bytes(piece_bytes), lease_seconds=lease_seconds, now=NOW)) is not None:
        handles.append(handle)
    return handles


def test_a_reader_gets_what_was_written(writer: Arena, reader: Arena) -> None:
    tokens = np.arange(1000, dtype=np.int32)
    handle = writer.write(tokens.data, lease_seconds=10, now=NOW)
    assert handle is not None
    assert np.array_equal(np.frombuffer(reader.read(handle, NOW), np.int32), tokens)


def test_a_handle_names_bytes_behind_the_table_and_inside_the_region(writer: Arena) -> None:
    handle = write(writer, b"x" * 100)
    assert handle.byte_count == 100
    assert HEADER_BYTES < handle.byte_offset <= SIZE - 100
    assert handle.byte_offset % 64 == 0
    assert handle.host_id == host_id()


def test_a_lease_that_ran_out_is_stale(writer: Arena, reader: Arena) -> None:
    handle = write(writer, b"abc", lease_seconds=10)
    assert reader.read(handle, NOW + 9.9) == b"abc"
    with pytest.raises(StaleHandle):
        reader.read(handle, NOW + 10)


def test_a_released_lease_is_stale_for_everybody_and_is_released_once(writer: Arena, reader: Arena) -> None:
    handle = write(writer, b"abc")
    assert reader.release(handle)
    assert not reader.release(handle)
    for arena in (reader, writer):
        with pytest.raises(StaleHandle):
            arena.read(handle, NOW)


def test_a_renewed_lease_outlives_its_first_expiry(writer: Arena, reader: Arena) -> None:
    handle = write(writer, b"abc", lease_seconds=10)
    assert reader.renew(handle, 100, NOW + 5)
    assert writer.reclaim(NOW + 50) == 0
    assert reader.read(handle, NOW + 50) == b"abc"
    assert writer.reclaim(NOW + 200) == 1


def test_a_renewal_never_shortens_a_lease(writer: Arena, reader: Arena) -> None:
    handle = write(writer, b"abc", lease_seconds=100)
    assert reader.renew(handle, 1, NOW)
    assert reader.read(handle, NOW + 50) == b"abc"


def test_a_lease_that_ran_out_cannot_be_renewed(writer: Arena, reader: Arena) -> None:
    handle = write(writer, b"abc", lease_seconds=10)
    assert not reader.renew(handle, 100, NOW + 10)


def test_bytes_are_taken_back_only_some_time_after_the_expiry(writer: Arena) -> None:
    write(writer, b"abc", lease_seconds=10)
    assert writer.reclaim(NOW + 10.5) == 0
    assert writer.reclaim(NOW + 11.5) == 1


def test_a_renewal_of_the_slots_earlier_lease_means_nothing(writer: Arena, reader: Arena) -> None:
    handles = fill(writer, 1024)
    assert all(reader.renew(handle, 1000, NOW) for handle in handles)
    assert all(reader.release(handle) for handle in handles)
    later = fill(writer, 1024, lease_seconds=1)
    assert writer.reclaim(NOW + 10) == len(later)


def test_a_full_arena_gives_none_and_does_not_grow(writer: Arena, region: str) -> None:
    handles = fill(writer, 10_000)
    assert len(handles) == 25
    assert os.stat(SHARED_MEMORY_FOLDER / region).st_size == SIZE
    assert writer.release(handles[7])
    assert writer.write(bytes(10_000), lease_seconds=1, now=NOW) is not None


def test_leases_are_bounded_too(writer: Arena) -> None:
    limit = writer.usage(NOW).lease_limit
    assert len(fill(writer, 1)) == limit
    assert writer.usage(NOW).lease_count == limit


def test_something_larger_than_the_arena_gives_none(writer: Arena) -> None:
    assert writer.write(bytes(SIZE), lease_seconds=1, now=NOW) is None


def test_a_reused_slot_makes_old_handles_stale(writer: Arena, reader: Arena) -> None:
    olds = fill(writer, 10_000)
    for old in olds:
        reader.release(old)
    news = fill(writer, 10_000)
    assert {old.lease_id for old in olds}.isdisjoint(new.lease_id for new in news)
    assert {old.byte_offset for old in olds} & {new.byte_offset for new in news}
    for old in olds:
        with pytest.raises(StaleHandle):
            reader.read(old, NOW)
        assert not reader.release(old)


@pytest.mark.parametrize(
    "fields",
    [
        {"byte_offset": 64},
        {"byte_offset": 2**63},
        {"byte_offset": SIZE},
        {"byte_count": 2**63},
        {"byte_count": 1},
        {"lease_id": 2**64 - 1},
        {"lease_id": 1},
        {"generation": 2**64 - 1},
        {"generation": 2},
    ],
)
def test_a_handle_with_any_wrong_number_is_stale(writer: Arena, reader: Arena, fields: dict[str, int]) -> None:
    handle = changed(write(writer, b"abc"), **fields)
    with pytest.raises(StaleHandle):
        reader.read(handle, NOW)
    assert not reader.release(handle)
    assert not reader.renew(handle, 10, NOW)


@pytest.mark.parametrize("fields", [{"host_id": "another"}, {"region": "another"}])
def test_a_handle_of_another_host_or_region_is_foreign(writer: Arena, reader: Arena, fields: dict[str, str]) -> None:
    with pytest.raises(ForeignHandle):
        reader.read(changed(write(writer, b"abc"), **fields), NOW)


def test_random_handles_never_do_more_than_raise(writer: Arena, reader: Arena) -> None:
    rng = random.Random(3)
    true = write(writer, b"abc")
    for _ in range(2000):
        handle = tensor_pb2.SharedMemoryHandle(
            host_id=host_id(),
            region=true.region,
            byte_offset=rng.choice([true.byte_offset, rng.getrandbits(64), rng.randrange(SIZE)]),
            byte_count=rng.choice([true.byte_count, rng.getrandbits(64), rng.randrange(SIZE)]),
            lease_id=rng.choice([true.lease_id, rng.getrandbits(64)]),
            generation=rng.choice([true.generation, rng.getrandbits(64)]),
        )
        if handle == true:
            continue
        with pytest.raises(StaleHandle):
            reader.read(handle, NOW)
    assert reader.read(true, NOW) == b"abc"


def test_a_second_writer_is_refused(writer: Arena, region: str) -> None:
    with pytest.raises(ArenaUnavailable, match="has a writer already"):
        Arena.open(region, SIZE)


def test_a_writer_that_comes_back_keeps_live_leases(region: str) -> None:
    first = Arena.open(region, SIZE)
    kept = write(first, b"kept" * 100)
    gone = write(first, b"gone" * 100)
    first.release(gone)
    first.close()
    second = Arena.open(region, SIZE)
    assert second.read(kept, NOW) == b"kept" * 100
    usage = second.usage(NOW)
    assert usage.lease_count == 1
    assert usage.free_byte_count == usage.byte_count - 448
    assert all(handle.byte_offset != kept.byte_offset for handle in fill(second, 400))
    second.close()


def test_a_region_of_another_size_is_replaced_and_its_handles_become_stale(region: str) -> None:
    first = Arena.open(region, SIZE)
    old = write(first, b"old")
    reader = Arena.attach(region)
    first.close()
    second = Arena.open(region, 2 * SIZE)
    assert second.byte_count == 2 * SIZE
    assert reader.read(old, NOW) == b"old"
    new = write(second, b"new")
    assert reader.read(new, NOW) == b"new"
    with pytest.raises(StaleHandle):
        reader.read(old, NOW)
    reader.close()
    second.close()


@pytest.mark.parametrize("offset", [0, 8, 16, 32, HEADER_BYTES])
def test_a_region_with_a_damaged_header_or_table_is_made_anew(region: str, offset: int) -> None:
    first = Arena.open(region, SIZE)
    old = write(first, b"old")
    first.close()
    with (SHARED_MEMORY_FOLDER / region).open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    second = Arena.open(region, SIZE)
    assert second.usage(NOW).lease_count == 0
    assert second.read(write(second, b"new"), NOW) == b"new"
    with pytest.raises(StaleHandle):
        second.read(old, NOW)
    second.close()


@pytest.mark.parametrize("content", [b"", b"short", b"x" * SIZE])
def test_a_reader_does_not_attach_to_something_else(region: str, content: bytes) -> None:
    (SHARED_MEMORY_FOLDER / region).write_bytes(content)
    with pytest.raises(ArenaUnavailable):
        Arena.attach(region)


def test_a_reader_does_not_attach_to_nothing(region: str) -> None:
    with pytest.raises(ArenaUnavailable, match="No such file"):
        Arena.attach(region)


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden"])
def test_a_name_that_cannot_be_a_region_is_refused(name: str) -> None:
    with pytest.raises(ArenaError):
        Arena.attach(name)


def test_more_memory_than_the_host_has_is_one_clear_error(region: str) -> None:
    with pytest.raises(ArenaUnavailable, match="bytes of shared memory"):
        Arena.open(region, 1 << 50)
    assert list(SHARED_MEMORY_FOLDER.glob(f"*{region}*")) == []


def test_a_tensor_goes_through_its_header_unchanged(writer: Arena) -> None:
    tensor = tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_INT32, shape=[25], shared_memory=write(writer, bytes(100))
    )
    header = encode_tensor_header(tensor)
    assert header.isascii() and "=" not in header
    assert decode_tensor_header(header) == tensor


@pytest.mark.parametrize(
    "header", ["", "A", "????", "AAAA", "\u00e9\u00e9\u00e9\u00e9", "A" * 10_000, "CAESAsgB", "\n", "a b="]
)
def test_a_header_that_is_no_tensor_is_corrupt(header: str) -> None:
    with pytest.raises(CorruptHandle):
        decode_tensor_header(header)
    assert issubclass(CorruptHandle, HandleError)


@pytest.mark.parametrize("seed", range(6))
def test_random_use_keeps_the_invariants(region: str, seed: int) -> None:
    """Writes, releases, renewals, time and restarts at random, against a plain model of what must be alive."""
    rng = random.Random(seed)
    writer, reader = Arena.open(region, SIZE), Arena.attach(region)
    now = NOW
    live: dict[int, tuple[tensor_pb2.SharedMemoryHandle, bytes, float]] = {}
    ended: list[tensor_pb2.SharedMemoryHandle] = []
    for _ in range(400):
        act = rng.random()
        if act < 0.5:
            data = rng.randbytes(rng.randint(1, 20_000))
            handle = writer.write(data, lease_seconds=5, now=now)
            if handle is not None:
                assert handle.lease_id not in live
                live[handle.lease_id] = (handle, data, now + 5)
        elif act < 0.7 and live:
            handle, _, _ = live.pop(rng.choice(list(live)))
            assert reader.release(handle)
            ended.append(handle)
        elif act < 0.8 and live:
            handle, data, _ = live[rng.choice(list(live))]
            assert reader.renew(handle, 8, now)
            live[handle.lease_id] = (handle, data, max(live[handle.lease_id][2], now + 8))
        elif act < 0.97:
            now += rng.choice([0.125, 0.5, 2.0])
            over = [lease_id for lease_id, (_, _, expiry) in live.items() if expiry <= now]
            ended.extend(live.pop(lease_id)[0] for lease_id in over)
        else:
            writer.close()
            writer = Arena.open(region, SIZE)
        check(writer, reader, live, ended[-50:], now)
    reader.close()
    writer.close()


def check(
    writer: Arena,
    reader: Arena,
    live: dict[int, tuple[tensor_pb2.SharedMemoryHandle, bytes, float]],
    ended: list[tensor_pb2.SharedMemoryHandle],
    now: float,
) -> None:
    places = sorted((handle.byte_offset, handle.byte_count) for handle, _, _ in live.values())
    for (offset, count), (following, _) in itertools.pairwise(places):
        assert offset + count <= following
    for handle, data, _ in live.values():
        assert reader.read(handle, now) == data
    for handle in ended:
        with pytest.raises(StaleHandle):
            reader.read(handle, now)
    usage = writer.usage(now)
    occupied = sum(-(-count // 64) * 64 for _, count in places)
    # Leases that ran out less than the grace ago still hold their bytes.
    assert usage.free_byte_count <= usage.byte_count - occupied
    assert usage.lease_count >= len(live)
    settled = writer.usage(now + 1000) if not live else usage
    assert live or (settled.lease_count == 0 and settled.free_byte_count == settled.byte_count)
