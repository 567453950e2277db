"""Requests that wait and are told their place: by id, and on their own streams, on a real mesh with a busy engine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import httpx
import openai
import pytest

from tidegate import client
from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

STATUS = {"x-queue-status": "stream"}
CHAT: dict[str, Any] = {"max_tokens": 4, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
REQUEST = pb.GenerateRequest(text="The tide", max_tokens=4)


@pytest.fixture(scope="module")
def mesh(start_module_mesh: Callable[..., Any]) -> Any:
    settings = {"TIDEGATE_SCHEDULER_BATCH_DEADLINE_SECONDS": "1.5"}
    return start_module_mesh("--max-sequences", "1", settings=settings)


@pytest.fixture
async def http(mesh: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh.url, timeout=60) as opened:
        yield opened


@pytest.fixture
async def busy(mesh: Any) -> AsyncIterator[Busy]:
    """The mesh with its one slot taken, so that all that comes has to wait."""
    async with open_channel(mesh.ingress) as channel, open_channel(mesh.address("mesh")) as inside:
        opened = Busy(channel, inside)
        await until(lambda: opened.has(running=0, in_hand=1))
        await opened.fill()
        await until(lambda: opened.has(running=1, in_hand=0))
        yield opened
        opened.free()


class Busy:
    """Holds the engine's one slot until the test lets go of it."""

    def __init__(self, channel: grpc.aio.Channel, inside: grpc.aio.Channel) -> None:
        self._inside = scheduler_pb2_grpc.SchedulerStub(inside)
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.scheduler = scheduler_pb2_grpc.SchedulerStub(channel)
        self._blocker: Any = None

    async def fill(self) -> None:
        blocker = pb.GenerateRequest(text="Story:", max_tokens=4000, ignore_eos=True)
        blocker.service_class = pb.SERVICE_CLASS_REALTIME
        self._blocker = self.inference.Generate(blocker, timeout=120)
        assert (await self._blocker.read()).HasField("started")

    def free(self) -> None:
        self._blocker.cancel()

    async def has(self, *, running: int, in_hand: int) -> bool:
        snapshot = await anext(aiter(self._inside.Watch(scheduler_pb2.WatchRequest(once=True), timeout=10)))
        [replica] = snapshot.replicas
        return (replica.load.running_request_count, replica.credit_count) == (running, in_hand)

    def wait_as(self, request_id: str) -> asyncio.Task[list[pb.GenerateEvent]]:
        request = pb.GenerateRequest(request_id=request_id, text="The tide", max_tokens=1)

        async def run() -> list[pb.GenerateEvent]:
            return [event async for event in self.inference.Generate(request)]

        return asyncio.create_task(run())


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await is_so():
            await asyncio.sleep(0.05)


async def waits(http: httpx.AsyncClient, name: str) -> bool:
    return (await http.get(f"/v1/queue/{name}")).status_code == 200


async def test_a_client_names_its_request_and_asks_for_it_by_that_name(http: httpx.AsyncClient, busy: Busy) -> None:
    chat = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT, headers={"x-client-request-id": "my-1"}))
    await until(lambda: waits(http, "my-1"))
    named = busy.wait_as("my-2")
    await until(lambda: waits(http, "my-2"))
    status = (await http.get("/v1/queue/my-2")).json()
    assert (status["id"], status["object"], status["position"]) == ("my-2", "queue.status", 2)
    request = scheduler_pb2.WatchQueueStatusRequest(request_id="my-1")
    watch = busy.scheduler.WatchQueueStatus(request, timeout=60)
    assert (await watch.read()).position == 1
    busy.free()
    states = []
    while (each := await watch.read()) is not grpc.aio.EOF:
        states.append(each.state)
    assert states[-1] == scheduler_pb2.QUEUE_STATE_DISPATCHED
    response = await chat
    assert response.status_code == 200
    assert (await named)[-1].HasField("finished")
    gone = await http.get("/v1/queue/my-1")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


async def test_http_streams_tell_falling_places_and_then_the_text(http: httpx.AsyncClient, busy: Busy) -> None:
    first = busy.wait_as("first")
    await until(lambda: waits(http, "first"))
    lines: list[str] = []
    async with http.stream("POST", "/v1/chat/completions", json=CHAT, headers=STATUS) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith(": queued position=2") and not lines:
                busy.free()
            if line:
                lines.append(line)
    await first
    places = [line for line in lines if line.startswith(": queued position=")]
    assert lines[: len(places)] == places
    assert lines[len(places)].startswith("data: {")
    assert lines[-1] == "data: [DONE]"


async def test_openais_client_reads_over_the_places(mesh: Any, http: httpx.AsyncClient, busy: Busy) -> None:
    opened = openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none")
    headers = {**STATUS, "x-client-request-id": "by-openai"}
    stream = asyncio.create_task(
        opened.chat.completions.create(
            model="smollm2-135m-instruct", messages=CHAT["messages"], max_tokens=4, stream=True, extra_headers=headers
        )
    )
    await until(lambda: waits(http, "by-openai"))
    chunks = await stream  # The response is open, and all it holds so far is comments.
    busy.free()
    reasons = [chunk.choices[0].finish_reason async for chunk in chunks]
    assert reasons[-1] in {"stop", "length"}


async def test_typed_streams_tell_their_place_too(mesh: Any, busy: Busy) -> None:
    kinds = []
    async with client.AsyncClient(mesh.ingress) as opened:
        async for event in opened.generate(REQUEST, queue_status=True):
            kinds.append(event.WhichOneof("event"))
            if kinds == ["queued"]:
                assert event.queued.position == 1
                busy.free()
    answer = [kind for kind in kinds if kind != "queued"]
    assert (kinds[0], answer[0], answer[-1]) == ("queued", "started", "finished")


async def test_a_refusal_after_a_place_was_told_is_the_last_event(http: httpx.AsyncClient, busy: Busy) -> None:
    request = pb.GenerateRequest(text="The tide", max_tokens=4, service_class=pb.SERVICE_CLASS_BATCH)
    call = busy.inference.Generate(request, metadata=tuple(STATUS.items()))
    events = [event async for event in call]
    assert events[0].HasField("queued")
    assert events[-1].finished.reason == pb.FINISH_REASON_ERROR
    assert events[-1].finished.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    response = await http.post("/v1/chat/completions", json=CHAT | {"service_tier": "flex"}, headers=STATUS)
    lines = response.text.strip().splitlines()
    assert response.status_code == 200
    assert lines[0].startswith(": queued position=1")
    assert '"code":"deadline_exceeded"' in lines[-1]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_before_any_place_is_a_plain_one(http: httpx.AsyncClient, stream: bool) -> None:
    body = CHAT | {"model": "no-such", "stream": stream}
    response = await http.post("/v1/chat/completions", json=body, headers=STATUS)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_answer_that_is_no_stream_has_no_places(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json=CHAT | {"stream": False}, headers=STATUS)
    assert response.json()["object"] == "chat.completion"


async def test_a_client_that_leaves_its_place_leaves_the_queue(http: httpx.AsyncClient, busy: Busy) -> None:
    headers = {**STATUS, "x-client-request-id": "leaver"}
    async with http.stream("POST", "/v1/chat/completions", json=CHAT, headers=headers) as response:
        lines = response.aiter_lines()  # Kept: the connection ends with it.
        while not (await anext(lines)).startswith(": queued"):
            pass
        assert await waits(http, "leaver")

    async def has_left() -> bool:
        return not await waits(http, "leaver")

    await until(has_left)


async def test_without_the_waiting_room_requests_go_the_ordinary_way(
    mesh: Any, http: httpx.AsyncClient, busy: Busy
) -> None:
    os.kill(mesh.record("waiting")["pid"], signal.SIGKILL)
    headers = {**STATUS, "x-client-request-id": "ordinary"}
    answer = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT, headers=headers))
    await until(lambda: waits(http, "ordinary"))
    busy.free()
    response = await answer
    assert response.status_code == 200
    assert response.text.startswith("data: ")
    mesh.wait_for(lambda: mesh.record("waiting")["restart_count"] > 0, 30)
