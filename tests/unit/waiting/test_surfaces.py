"""What a place and an error are on each surface."""

from __future__ import annotations

import json

import httpx
import openai
from google.api import httpbody_pb2

from tidegate.common.errors import Reason, TidegateError, from_status
from tidegate.openai.request import parse_chat_completions
from tidegate.v1 import inference_pb2, scheduler_pb2
from tidegate.waiting.surfaces import ServerSentEvents, TypedEvents

BODY = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
ERROR = TidegateError(Reason.SERVER_IS_OVERLOADED, "not now", retry_after_seconds=3)


def status(*, eta_ms: int | None) -> scheduler_pb2.QueueStatus:
    result = scheduler_pb2.QueueStatus(position=3)
    if eta_ms is not None:
        result.expected_wait.FromMilliseconds(eta_ms)
    return result


def sse() -> ServerSentEvents:
    return ServerSentEvents(parse_chat_completions(BODY), "r", 1)


def data_of(message: bytes) -> bytes:
    body = httpbody_pb2.HttpBody.FromString(message)
    assert body.content_type == "text/event-stream"
    return body.data


def test_a_place_is_a_comment_line_with_the_time_where_it_is_known():
    assert data_of(sse().queued(status(eta_ms=4200))) == b": queued position=3 eta_ms=4200\n\n"
    assert data_of(sse().queued(status(eta_ms=None))) == b": queued position=3\n\n"


def test_an_error_is_a_chunk_that_ends_the_choice_and_then_the_error_object():
    lines = data_of(sse().error(ERROR)).decode().strip().split("\n\n")
    chunk, error = (json.loads(line.removeprefix("data: ")) for line in lines)
    assert chunk["choices"][0]["finish_reason"] == "error"
    assert error["error"]["code"] == "server_is_overloaded"


def test_openais_client_reads_over_the_places():
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunk |= {"choices": [{"index": 0, "delta": {"content": "tide"}, "finish_reason": None}]}
    places = data_of(sse().queued(status(eta_ms=4200))) + data_of(sse().queued(status(eta_ms=None)))
    stream = places + f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    )
    client = openai.OpenAI(api_key="k", base_url="http://mesh", http_client=httpx.Client(transport=transport))
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
    assert [each.choices[0].delta.content for each in answer] == ["tide"]


def test_a_place_is_a_typed_event():
    event = inference_pb2.GenerateEvent.FromString(TypedEvents("mine").queued(status(eta_ms=4200)))
    assert (event.request_id, event.queued.position, event.queued.expected_wait.ToMilliseconds()) == ("mine", 3, 4200)
    event = inference_pb2.GenerateEvent.FromString(TypedEvents("mine").queued(status(eta_ms=None)))
    assert not event.queued.HasField("expected_wait")


def test_a_typed_error_finishes_the_answer():
    event = inference_pb2.GenerateEvent.FromString(TypedEvents("mine").error(ERROR))
    assert event.finished.reason == inference_pb2.FINISH_REASON_ERROR
    assert from_status(event.finished.error).reason is Reason.SERVER_IS_OVERLOADED
