"""The client library against a server that does as each test says: what is waited for, resumed, and given up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from tidegate import client
from tidegate.common.errors import Reason, TidegateError, abort, to_status
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

Step = pb.GenerateEvent | Exception | grpc.StatusCode | None
"""An event; a refusal; a status without any reason of the mesh; None: silence until the client leaves."""

REQUEST = pb.GenerateRequest(text="The tide", max_tokens=4)
STARTED = pb.GenerateEvent(started=pb.Started(model="fake", prompt_token_count=2))
FINISHED = pb.GenerateEvent(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH))

QUEUED = pb.GenerateEvent(queued=pb.Queued(position=3))


def delta(token_id: int) -> pb.GenerateEvent:
    return pb.GenerateEvent(delta=pb.Delta(text=f"<{token_id}>", token_ids=[token_id]))


def refusal(seconds: float | None, reason: Reason = Reason.SERVER_IS_OVERLOADED) -> TidegateError:
    return TidegateError(reason, "not now", retry_after_seconds=seconds)


class FakeMesh(inference_pb2_grpc.InferenceServicer):
    """Plays one script a call, the last one again and again."""

    def __init__(self, *scripts: list[Step]) -> None:
        self.scripts = scripts
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = threading.Event()
        self.address = ""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            for step in self.scripts[min(len(self.requests), len(self.scripts)) - 1]:
                await self._play(step, context)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _play(self, step: Step, context: Any) -> None:
        if isinstance(step, pb.GenerateEvent):
            await context.write(step)
        elif isinstance(step, TidegateError):
            await abort(context, step)
        elif isinstance(step, grpc.StatusCode):
            await context.abort(step, "broken")
        else:
            await asyncio.sleep(30)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeMesh]]:
    """Starts a fake mesh in a thread of its own, so that clients with and without a loop can call it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    servers: list[grpc.aio.Server] = []

    async def start(mesh: FakeMesh) -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(mesh, server)
        mesh.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        servers.append(server)

    def begin(*scripts: list[Step]) -> FakeMesh:
        mesh = FakeMesh(*scripts)
        asyncio.run_coroutine_threadsafe(start(mesh), loop).result(10)
        return mesh

    yield begin
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


async def events_of(
    mesh: FakeMesh, request: pb.GenerateRequest = REQUEST, *, timeout_seconds: float | None = 10, **options: Any
) -> list[pb.GenerateEvent]:
    async with client.AsyncClient(mesh.address, **options) as opened:
        return [event async for event in opened.generate(request, timeout_seconds=timeout_seconds)]


async def test_a_refusal_that_names_a_time_is_waited_for(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([refusal(0.2)], [STARTED, delta(1), FINISHED])
    begin = time.monotonic()
    assert await events_of(mesh) == [STARTED, delta(1), FINISHED]
    assert time.monotonic() - begin >= 0.2
    assert mesh.requests == [REQUEST, REQUEST]


@pytest.mark.parametrize(
    ("error", "options", "timeout_seconds", "retry_after_seconds"),
    [
        (refusal(None, Reason.INVALID_VALUE), {}, 10, None),
        (refusal(0.05), {"retries": False}, 10, 0.05),
        (refusal(8.0), {}, 2, 8.0),
    ],
    ids=["a refusal for good", "retries are off", "the wait would pass the deadline"],
)
async def test_a_refusal_is_the_callers_at_once(
    serve: Callable[..., FakeMesh],
    error: TidegateError,
    options: dict[str, Any],
    timeout_seconds: float,
    retry_after_seconds: float | None,
) -> None:
    mesh = serve([error])
    with pytest.raises(client.RequestFailed) as raised:
        await events_of(mesh, timeout_seconds=timeout_seconds, **options)
    failure = raised.value
    assert (failure.status, failure.reason) == (error.surface.grpc_status, error.reason.name)
    assert (failure.message, failure.retry_after_seconds) == ("not now", retry_after_seconds)
    assert len(mesh.requests) == 1


async def test_a_request_that_is_refused_again_and_again_is_given_up(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([refusal(0.01)])
    with pytest.raises(client.RequestFailed):
        await events_of(mesh)
    assert len(mesh.requests) == client.RETRY_LIMIT + 1


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
async def test_a_stream_that_breaks_goes_on_with_the_tokens_that_came(
    serve: Callable[..., FakeMesh], status: grpc.StatusCode
) -> None:
    mesh = serve([STARTED, delta(1), delta(2), status], [STARTED, delta(3), status], [STARTED, delta(4), FINISHED])
    assert await events_of(mesh) == [STARTED, delta(1), delta(2), delta(3), delta(4), FINISHED]
    assert [list(each.resume.token_ids) for each in mesh.requests] == [[], [1, 2], [1, 2, 3]]
    assert all(each.text == REQUEST.text and each.max_tokens == 4 for each in mesh.requests)
    # Whichever model answered, it alone can go on.
    assert [each.model for each in mesh.requests] == ["", STARTED.started.model, STARTED.started.model]
    assert STARTED.started.model


async def test_a_resumed_stream_keeps_the_tokens_that_the_caller_brought(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, delta(8), grpc.StatusCode.UNAVAILABLE], [STARTED, FINISHED])
    request = pb.GenerateRequest(text="The tide", resume=pb.TokenIds(token_ids=[7]))
    await events_of(mesh, request)
    assert [list(each.resume.token_ids) for each in mesh.requests] == [[7], [7, 8]]
    assert list(request.resume.token_ids) == [7]


async def test_a_stream_that_breaks_again_and_again_is_given_up(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, delta(1), grpc.StatusCode.UNAVAILABLE])
    with pytest.raises(client.RequestFailed):
        await events_of(mesh)
    assert len(mesh.requests) == client.RESUME_LIMIT + 1


async def test_a_resumption_that_is_refused_is_waited_for_too(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, delta(1), grpc.StatusCode.UNAVAILABLE], [refusal(0.01)], [STARTED, delta(2), FINISHED])
    assert await events_of(mesh) == [STARTED, delta(1), delta(2), FINISHED]


async def test_a_failure_that_says_its_reason_is_not_resumed(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, delta(1), refusal(None, Reason.DEADLINE_EXCEEDED)])
    with pytest.raises(client.RequestFailed) as raised:
        await events_of(mesh)
    assert raised.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(mesh.requests) == 1


async def test_the_callers_time_limit_holds_over_all_attempts(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, delta(1), grpc.StatusCode.UNAVAILABLE], [STARTED, None])
    with pytest.raises(client.RequestFailed) as raised:
        await asyncio.wait_for(events_of(mesh, timeout_seconds=0.5), 10)
    assert raised.value.status is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_places_in_the_queue_are_yielded_to_a_caller_that_wants_them(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([QUEUED, STARTED, delta(1), FINISHED])
    async with client.AsyncClient(mesh.address) as opened:
        events = [event async for event in opened.generate(REQUEST, queue_status=True)]
    assert events == [QUEUED, STARTED, delta(1), FINISHED]
    assert mesh.metadata[0]["x-queue-status"] == "stream"


async def test_a_refusal_after_a_place_was_told_is_waited_for_like_any_other(serve: Callable[..., FakeMesh]) -> None:
    status = to_status(refusal(0.01))
    refused = pb.GenerateEvent(finished=pb.Finished(reason=pb.FINISH_REASON_ERROR, error=status))
    mesh = serve([QUEUED, refused], [STARTED, delta(1), FINISHED])
    assert await events_of(mesh) == [QUEUED, STARTED, delta(1), FINISHED]
    with pytest.raises(client.RequestFailed) as raised:
        await events_of(serve([QUEUED, refused]), retries=False)
    assert (raised.value.reason, raised.value.retry_after_seconds) == ("SERVER_IS_OVERLOADED", 0.01)


async def test_the_api_key_is_sent_as_a_bearer_token(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, FINISHED])
    await events_of(mesh, api_key="sesame")
    await events_of(mesh)
    assert [each.get("authorization") for each in mesh.metadata] == ["Bearer sesame", None]


async def test_leaving_a_stream_cancels_it(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, delta(1), None])
    async with client.AsyncClient(mesh.address) as opened:
        events = opened.generate(REQUEST)
        assert await anext(events) == STARTED
        await events.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(mesh.cancelled.wait, 5)


def test_the_client_without_a_loop_does_the_same(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([refusal(0.01)], [STARTED, delta(1), grpc.StatusCode.UNAVAILABLE], [STARTED, delta(2), FINISHED])
    with client.Client(mesh.address) as opened:
        assert list(opened.generate(REQUEST)) == [STARTED, delta(1), delta(2), FINISHED]


def test_the_client_without_a_loop_cancels_what_is_left(serve: Callable[..., FakeMesh]) -> None:
    mesh = serve([STARTED, delta(1), None])
    with client.Client(mesh.address) as opened:
        for event in opened.generate(REQUEST):
            if event.HasField("delta"):
                break
        assert mesh.cancelled.wait(5)


def test_a_chat_request_has_the_messages_in_order() -> None:
    request = client.chat_request([("system", "Be brief."), ("user", "Hello")], max_tokens=3)
    assert [(each.role, each.content) for each in request.chat.messages] == [("system", "Be brief."), ("user", "Hello")]
    assert request.max_tokens == 3
