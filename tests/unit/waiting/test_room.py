"""A stream in the waiting room, between a client and a call that do as each test says; time is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from grpc.aio import Metadata

from tidegate.common.errors import Reason, TidegateError, trailing_metadata
from tidegate.v1 import scheduler_pb2
from tidegate.waiting.room import DoesNotRead, Stream

LONG = 60.0


def refusal(reason: Reason = Reason.SERVER_IS_OVERLOADED) -> grpc.aio.AioRpcError:
    error = TidegateError(reason, "not now", retry_after_seconds=3)
    return grpc.aio.AioRpcError(
        error.surface.grpc_status, Metadata(), Metadata(*trailing_metadata(error)), details=error.message
    )


class FakeClient:
    """Notes what it reads; `reads` false leaves it unread."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.metadata: Sequence[tuple[str, str | bytes]] | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self.wrote = asyncio.Condition()
        self.on_open = lambda: None

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        async with self.wrote:
            self.messages.append(message)
            self.wrote.notify_all()

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self.metadata = metadata
        self.on_open()

    async def has(self, count: int) -> None:
        async with asyncio.timeout(5), self.wrote:
            await self.wrote.wait_for(lambda: len(self.messages) >= count)


class FakeCall:
    """Answers with what the test puts into it: messages, an error, or EOF."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[Any] = asyncio.Queue()
        self.was_cancelled = False
        self.read_count = 0

    def say(self, *parts: Any) -> None:
        for part in parts:
            self.parts.put_nowait(part)

    async def read(self) -> Any:
        part = await self.parts.get()
        self.read_count += 1
        if isinstance(part, Exception):
            raise part
        return part

    async def initial_metadata(self) -> Metadata:
        return Metadata(("cache-control", "no-cache"), ("x-request-id", "r"), ("grpc-encoding", "identity"))

    def cancel(self) -> None:
        self.was_cancelled = True


class FakePlace:
    def __init__(self) -> None:
        self.status: scheduler_pb2.QueueStatus | None = None
        self.changed = asyncio.Event()

    def move(self, position: int | None) -> None:
        self.status = None if position is None else scheduler_pb2.QueueStatus(position=position)
        self.changed.set()


class FakeSurface:
    def __init__(self, *, ends_with_status: bool = False) -> None:
        self.ends_with_status = ends_with_status
        self.opening = (("opened", "early"),)

    def queued(self, status: scheduler_pb2.QueueStatus) -> bytes:
        return f"position {status.position}".encode()

    def error(self, error: TidegateError) -> bytes:
        return f"error {error.reason.name}".encode()


class Bench:
    """One stream and its two ends."""

    def __init__(self, **options: Any) -> None:
        self.client, self.call, self.place = FakeClient(), FakeCall(), FakePlace()
        surface = FakeSurface(ends_with_status=options.pop("ends_with_status", False))
        values = {"least_interval_seconds": 0.0, "longest_silence_seconds": LONG, "write_seconds": LONG, **options}
        clock = asyncio.get_running_loop().time
        self.stream = Stream(self.client, self.call, surface, self.place, clock=clock, **values)
        self.task = asyncio.create_task(self.stream.run())

    async def end(self) -> list[bytes]:
        await asyncio.wait_for(self.task, 5)
        return self.client.messages


async def test_an_answer_that_does_not_wait_passes_as_it_is():
    bench = Bench()
    bench.call.say(b"one", b"two", grpc.aio.EOF)
    assert await bench.end() == [b"one", b"two"]
    assert bench.client.metadata == [("cache-control", "no-cache")]


async def test_places_are_told_as_they_change_and_then_the_answer_follows():
    bench = Bench()
    for number, position in enumerate((3, 1), start=1):
        bench.place.move(position)
        await bench.client.has(number)
    bench.place.move(None)
    bench.call.say(b"answer", grpc.aio.EOF)
    assert await bench.end() == [b"position 3", b"position 1", b"answer"]
    assert bench.client.metadata == (("opened", "early"),)


async def test_a_place_that_is_lost_as_the_response_opens_is_still_told():
    bench = Bench()
    bench.client.on_open = lambda: bench.place.move(None)
    bench.place.move(1)
    await bench.client.has(1)
    bench.call.say(b"answer", grpc.aio.EOF)
    assert await bench.end() == [b"position 1", b"answer"]


async def test_changes_that_come_too_fast_are_told_as_one():
    bench = Bench(least_interval_seconds=0.2)
    bench.place.move(9)
    await bench.client.has(1)
    for position in (8, 7, 6):
        bench.place.move(position)
    await bench.client.has(2)
    bench.call.say(b"answer", grpc.aio.EOF)
    assert await bench.end() == [b"position 9", b"position 6", b"answer"]


async def test_an_unchanged_place_is_said_again_after_a_while():
    bench = Bench(longest_silence_seconds=0.01)
    bench.place.move(2)
    await bench.client.has(3)
    bench.call.say(b"answer", grpc.aio.EOF)
    messages = await bench.end()
    assert set(messages[:-1]) == {b"position 2"}


async def test_a_refusal_before_anything_was_written_is_a_plain_one():
    bench = Bench()
    bench.call.say(refusal())
    with pytest.raises(TidegateError) as raised:
        await bench.end()
    assert (raised.value.reason, raised.value.retry_after_seconds) == (Reason.SERVER_IS_OVERLOADED, 3)
    assert bench.client.messages == []


async def test_a_refusal_after_a_place_was_told_is_the_last_message():
    bench = Bench()
    bench.place.move(1)
    await bench.client.has(1)
    bench.call.say(refusal(Reason.DEADLINE_EXCEEDED))
    assert await bench.end() == [b"position 1", b"error DEADLINE_EXCEEDED"]


async def test_an_answer_that_breaks_keeps_its_status_where_the_surface_has_one():
    bench = Bench(ends_with_status=True)
    broken = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), details="gone")
    bench.call.say(b"one", broken)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await bench.end()
    assert raised.value is broken


async def test_an_answer_that_breaks_says_so_in_a_last_message_elsewhere():
    bench = Bench()
    bench.call.say(b"one", grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), details="gone"))
    assert await bench.end() == [b"one", b"error REPLICA_UNAVAILABLE"]


@pytest.mark.parametrize("position", [None, 1])
async def test_a_client_that_leaves_ends_the_call(position):
    bench = Bench()
    if position is not None:
        bench.place.move(position)
        await bench.client.has(1)
    await asyncio.sleep(0)
    bench.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bench.end()
    assert bench.call.was_cancelled


async def test_a_slow_reader_has_one_message_waiting_and_no_more():
    bench = Bench()
    bench.client.reads.clear()
    bench.call.say(*[b"x"] * 10, grpc.aio.EOF)
    for _ in range(50):
        await asyncio.sleep(0)
    assert bench.call.read_count == 1
    bench.client.reads.set()
    assert len(await bench.end()) == 10


async def test_a_reader_that_never_reads_is_given_up():
    bench = Bench(write_seconds=0.01)
    bench.client.reads.clear()
    bench.call.say(b"x")
    with pytest.raises(DoesNotRead):
        await bench.end()
    assert bench.call.was_cancelled
