"""More work than one small engine can take: lanes in order, places that can be asked for, refusals that say when."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

SLOT_COUNT = 2
LANE_LIMIT = 30
CLASSES = (pb.SERVICE_CLASS_REALTIME, pb.SERVICE_CLASS_STANDARD, pb.SERVICE_CLASS_BATCH)


@pytest.fixture(scope="module")
def mesh(start_module_mesh: Callable[..., Any]) -> Any:
    limits = {f"TIDEGATE_SCHEDULER_{name}_REQUEST_LIMIT": str(LANE_LIMIT) for name in ("REALTIME", "STANDARD", "BATCH")}
    return start_module_mesh("--max-sequences", str(SLOT_COUNT), settings=limits)


@pytest.fixture
async def queue(mesh: Any) -> AsyncIterator[Queue]:
    """The mesh with every slot taken, so that all that comes has to wait."""
    async with open_channel(mesh.ingress) as ingress, open_channel(mesh.address("mesh")) as inside:
        opened = Queue(ingress, inside)
        await opened.until(lambda: opened.is_waiting(0), 30)
        await opened.fill_slots()
        yield opened
        await opened.leave()


@dataclass
class Answer:
    """What came of one request, and when."""

    service_class: pb.ServiceClass.ValueType
    first_at: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    finished: pb.Finished | None = None


class Queue:
    """Fills the engine, lets go of it again, and asks what waits."""

    def __init__(self, ingress: grpc.aio.Channel, inside: grpc.aio.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceStub(ingress)
        self.inside = inference_pb2_grpc.InferenceStub(inside)
        self.scheduler = scheduler_pb2_grpc.SchedulerStub(inside)
        self._blockers: list[grpc.aio.UnaryStreamCall] = []

    async def fill_slots(self) -> None:
        for number in range(SLOT_COUNT):
            blocker = pb.GenerateRequest(
                text=f"Story {number}:", max_tokens=4000, ignore_eos=True, service_class=pb.SERVICE_CLASS_REALTIME
            )
            self._blockers.append(self.inference.Generate(blocker, timeout=100))
            assert (await self._blockers[-1].read()).HasField("started")

    async def leave(self) -> None:
        for each in self._blockers:
            each.cancel()

    async def answer(self, number: int, service_class: pb.ServiceClass.ValueType) -> Answer:
        request = pb.GenerateRequest(
            tokens=pb.TokenIds(token_ids=[2000 + number, 17, 23, 5]),
            max_tokens=2,
            ignore_eos=True,
            service_class=service_class,
        )
        answer = Answer(service_class)
        async for event in self.inference.Generate(request, timeout=100):
            answer.first_at = answer.first_at or time.monotonic()
            answer.token_ids.extend(event.delta.token_ids)
            if event.HasField("finished"):
                answer.finished = event.finished
        return answer

    async def send(self, classes: Sequence[pb.ServiceClass.ValueType]) -> list[asyncio.Task[Answer]]:
        """All at once; when this returns, all of them wait."""
        tasks = [asyncio.create_task(self.answer(number, each)) for number, each in enumerate(classes)]
        await self.until(lambda: self.is_waiting(len(tasks)), 30)
        return tasks

    async def snapshot(self) -> scheduler_pb2.Snapshot:
        return await anext(aiter(self.scheduler.Watch(scheduler_pb2.WatchRequest(once=True), timeout=10)))

    async def waiting(self) -> dict[int, int]:
        return {lane.service_class: lane.waiting_request_count for lane in (await self.snapshot()).lanes}

    async def is_waiting(self, count: int) -> bool:
        return sum((await self.waiting()).values()) == count

    async def until(self, is_true: Callable[[], Awaitable[bool]], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not await is_true():
            assert time.monotonic() < deadline, f"not true after {seconds} s: {await self.waiting()}"
            await asyncio.sleep(0.05)


async def test_sixty_at_once_are_all_answered_in_the_order_of_their_lanes(queue: Queue) -> None:
    # The most urgent come last.
    classes = [each for each in reversed(CLASSES) for _ in range(20)]
    tasks = await queue.send(classes)
    snapshot = await queue.snapshot()
    assert [lane.waiting_request_count for lane in snapshot.lanes] == [20, 20, 20]
    assert all(lane.waiting_token_count >= lane.waiting_request_count * 6 for lane in snapshot.lanes)
    assert all(lane.oldest_wait.ToMicroseconds() > 0 for lane in snapshot.lanes)
    assert all(lane.waiting_bytes > 0 and lane.request_limit == LANE_LIMIT for lane in snapshot.lanes)
    [replica] = snapshot.replicas
    assert replica.connected and replica.load.running_request_count == SLOT_COUNT == replica.load.slot_count
    await queue.leave()
    answers = await asyncio.gather(*tasks)
    assert all(each.finished.reason == pb.FINISH_REASON_LENGTH and len(each.token_ids) == 2 for each in answers)
    starts = {each: sorted(answer.first_at for answer in answers if answer.service_class == each) for each in CLASSES}
    for urgent, later in itertools.pairwise(CLASSES):
        overtaking = sum(first < starts[urgent][-1] for first in starts[later])
        # What ran at the same time as the last of the lane before may have been quicker.
        assert overtaking <= SLOT_COUNT, (urgent, later, starts)
    await queue.until(lambda: queue.is_waiting(0), 10)


async def test_a_waiting_request_is_told_its_place(queue: Queue) -> None:
    ids = [str(uuid.uuid4()) for _ in range(3)]
    calls = []
    for place, request_id in enumerate(ids):
        request = pb.GenerateRequest(text="The tide", max_tokens=1)
        calls.append(queue.inside.Generate(request, metadata=[("x-request-id", request_id)], timeout=60))
        await queue.until(lambda place=place: queue.is_waiting(place + 1), 20)
    statuses = [
        await queue.scheduler.GetQueueStatus(scheduler_pb2.GetQueueStatusRequest(request_id=each)) for each in ids
    ]
    assert [each.position for each in statuses] == [1, 2, 3]
    assert {each.service_class for each in statuses} == {pb.SERVICE_CLASS_STANDARD}
    assert all(each.waited.ToMicroseconds() > 0 for each in statuses)
    # One that leaves gives its place to those behind it.
    calls[0].cancel()
    await queue.until(lambda: queue.is_waiting(2), 10)
    request = scheduler_pb2.GetQueueStatusRequest(request_id=ids[2])
    assert (await queue.scheduler.GetQueueStatus(request)).position == 2
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await queue.scheduler.GetQueueStatus(scheduler_pb2.GetQueueStatusRequest(request_id=ids[0]))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    await queue.leave()
    for call in calls[1:]:
        assert [event async for event in call][-1].HasField("finished")


async def test_past_its_bound_a_lane_refuses_and_says_when_to_come_back(mesh: Any, queue: Queue) -> None:
    batch = pb.SERVICE_CLASS_BATCH
    waiting = await queue.send([batch] * LANE_LIMIT)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await queue.answer(99, batch)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    metadata = dict(raised.value.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(retry)
    assert (info.reason, metadata["x-tidegate-reason"]) == ("SERVER_IS_OVERLOADED", "SERVER_IS_OVERLOADED")
    assert int(metadata["grpc-retry-pushback-ms"]) == retry.retry_delay.ToMilliseconds() > 0
    body = {"model": "smollm2-135m-instruct", "prompt": "x", "service_tier": "flex"}
    async with httpx.AsyncClient(base_url=mesh.url, timeout=60) as http:
        refused = await http.post("/v1/completions", json=body)
        streamed = await http.post("/v1/completions", json=body | {"stream": True})
        # The other lanes have room.
        urgent = asyncio.ensure_future(http.post("/v1/completions", json=body | {"service_tier": "priority"}))
        await queue.until(lambda: queue.is_waiting(LANE_LIMIT + 1), 10)
        await queue.leave()
        assert (await urgent).status_code == 200
    for response in (refused, streamed):
        assert response.status_code == 503
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("service_unavailable_error", "server_is_overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) > 0
        assert response.headers["x-request-id"]
    answers = await asyncio.gather(*waiting)
    assert all(each.finished.reason == pb.FINISH_REASON_LENGTH for each in answers)
    assert (await queue.snapshot()).totals.refused["SERVER_IS_OVERLOADED"] == 3
