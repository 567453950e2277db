"""The shapes are checked by OpenAI's own package, and its client reads the streams."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tidegate.common.errors import Reason, TidegateError, from_status, to_status
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions
from tidegate.openai.response import DONE, ResponseFormatter, models_json, system_fingerprint
from tidegate.v1 import inference_pb2 as pb

TRICKY = 'a"b\\c\n\r\té👍\u2028\u2029\x85\x00\x7f</script>'


def chat_request(**fields: Any) -> OpenAIRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_chat_completions(json.dumps(body).encode())


def completion_request(**fields: Any) -> OpenAIRequest:
    return parse_completions(json.dumps({"model": "m", "prompt": "x", **fields}).encode())


def started() -> pb.GenerateEvent:
    return pb.GenerateEvent(started=pb.Started(model="the-model", prompt_token_count=3))


def delta(text: str, *logprobs: pb.TokenLogprob) -> pb.GenerateEvent:
    return pb.GenerateEvent(delta=pb.Delta(text=text, token_ids=[1], logprobs=logprobs))


def finished(reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP) -> pb.GenerateEvent:
    usage = pb.Usage(prompt_token_count=3, completion_token_count=2, cached_token_count=1)
    return pb.GenerateEvent(finished=pb.Finished(reason=reason, usage=usage))


def failed(error: TidegateError) -> pb.GenerateEvent:
    return pb.GenerateEvent(finished=pb.Finished(reason=pb.FINISH_REASON_ERROR, error=to_status(error)))


def logprob(text: bytes, value: float, *alternatives: pb.TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=1, text=text, logprob=value, alternatives=alternatives)


def formatter(request: OpenAIRequest) -> ResponseFormatter:
    return ResponseFormatter(request, "id-1", 1_700_000_000)


def stream(request: OpenAIRequest, *events: pb.GenerateEvent) -> bytes:
    answer = formatter(request)
    return b"".join(answer.event(event) for event in events)


def chunks(body: bytes) -> list[Any]:
    """As a strict reader of server-sent events sees it."""
    assert body.endswith(b"\n\n")
    messages = body.decode().split("\n\n")[:-1]
    assert all(message.startswith("data: ") and len(message.splitlines()) == 1 for message in messages)
    return [None if message == "data: [DONE]" else json.loads(message[6:]) for message in messages]


def client(body: bytes, content_type: str) -> openai.OpenAI:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=body, headers={"content-type": content_type})

    transport = httpx.MockTransport(answer)
    return openai.OpenAI(api_key="k", base_url="http://mesh/v1", http_client=httpx.Client(transport=transport))


def test_a_whole_chat_answer_has_openais_shape() -> None:
    body = formatter(chat_request(service_tier="flex")).complete(
        [started(), delta("Hel"), delta(TRICKY), finished(pb.FINISH_REASON_LENGTH)]
    )
    answer = ChatCompletion.model_validate_json(body)
    assert answer.id == "chatcmpl-id-1"
    assert (answer.model, answer.created, answer.object) == ("the-model", 1_700_000_000, "chat.completion")
    assert answer.service_tier == "flex"
    assert answer.system_fingerprint == system_fingerprint("the-model")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hel" + TRICKY)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_a_whole_completion_has_openais_shape() -> None:
    body = formatter(completion_request()).complete([started(), delta("a"), delta("b"), finished()])
    answer = Completion.model_validate_json(body)
    assert (answer.id, answer.object) == ("cmpl-id-1", "text_completion")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("ab", "stop", None)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5


def test_a_chat_stream_has_role_texts_reason_and_end() -> None:
    body = stream(chat_request(stream=True), started(), delta("Hel"), delta(""), delta(TRICKY), finished())
    *messages, end = chunks(body)
    assert end is None
    read = [ChatCompletionChunk.model_validate(message) for message in messages]
    assert {(one.id, one.model, one.object) for one in read} == {
        ("chatcmpl-id-1", "the-model", "chat.completion.chunk")
    }
    assert [one.choices[0].delta.role for one in read] == ["assistant", None, None, None]
    assert [one.choices[0].delta.content for one in read] == ["", "Hel", TRICKY, None]
    assert [one.choices[0].finish_reason for one in read] == [None, None, None, "stop"]
    assert all("usage" not in message for message in messages)


def test_a_completion_stream_has_texts_reason_and_end() -> None:
    body = stream(completion_request(stream=True), started(), delta("Hel"), delta(TRICKY), finished())
    *messages, end = chunks(body)
    assert end is None
    assert [message["choices"][0]["text"] for message in messages] == ["Hel", TRICKY, ""]
    assert [message["choices"][0]["finish_reason"] for message in messages] == [None, None, "stop"]
    for message in messages[-1:]:
        Completion.model_validate(message)


@pytest.mark.parametrize("make", [chat_request, completion_request])
def test_usage_comes_last_where_it_is_asked_for(make: Any) -> None:
    body = stream(make(stream=True, stream_options={"include_usage": True}), started(), delta("a"), finished())
    *messages, last, end = chunks(body)
    assert end is None
    assert all(message["usage"] is None for message in messages)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_chat_logprobs_have_openais_shape() -> None:
    first = logprob(b"Hi", -0.25, logprob(b"Hi", -0.25), logprob(b"\xf0\x9f", -math.inf))
    request = chat_request(logprobs=True, top_logprobs=2)
    answer = ChatCompletion.model_validate_json(
        formatter(request).complete([started(), delta("Hi", first), finished()])
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    [entry] = answer.choices[0].logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("Hi", -0.25, [72, 105])
    assert [(top.token, top.logprob, top.bytes) for top in entry.top_logprobs] == [
        ("Hi", -0.25, [72, 105]),
        ("\ufffd", -9999.0, [0xF0, 0x9F]),
    ]
    [_, message, *_] = chunks(stream(request, started(), delta("Hi", first), finished()))
    streamed = ChatCompletionChunk.model_validate(message).choices[0]
    assert streamed.logprobs is not None
    assert streamed.logprobs.model_dump() == answer.choices[0].logprobs.model_dump()


def test_completion_logprobs_have_openais_shape_and_running_offsets() -> None:
    events = [
        started(),
        delta("Hé", logprob(b"H", -1, logprob(b"H", -1)), logprob("é".encode(), -2, logprob(b"\xc3", -3))),
        delta("!", logprob(b"!", math.nan, logprob(b"!", 0))),
        finished(),
    ]
    request = completion_request(logprobs=1)
    answer = Completion.model_validate_json(formatter(request).complete(events))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["H", "é", "!"]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.token_logprobs == [-1, -2, -9999]
    assert logprobs.top_logprobs == [{"H": -1}, {"bytes:\\xc3": -3}, {"!": 0}]
    streamed = [message["choices"][0]["logprobs"] for message in chunks(stream(request, *events))[:2]]
    assert [one["text_offset"] for one in streamed] == [[0, 1], [2]]


def test_the_official_client_reads_a_stream() -> None:
    body = stream(chat_request(stream=True), started(), delta("Hel"), delta(TRICKY), finished())
    read = client(body, "text/event-stream").chat.completions.create(
        model="m", messages=[{"role": "user", "content": "x"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in read) == "Hel" + TRICKY


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_an_error_within_a_stream_reaches_the_official_client(kind: str) -> None:
    request = chat_request(stream=True) if kind == "chat" else completion_request(stream=True)
    error = TidegateError(Reason.REPLICA_UNAVAILABLE, "The replica is gone.", retry_after_seconds=2)
    body = stream(request, started(), delta("Hel"), failed(error))
    assert DONE not in body
    *_, last, problem = chunks(body)
    assert last["choices"][0]["finish_reason"] == "error"
    assert problem["error"]["code"] == "replica_unavailable"
    sdk = client(body, "text/event-stream")
    if kind == "chat":
        read: Any = sdk.chat.completions.create(model="m", messages=[], stream=True)
        texts = (chunk.choices[0].delta.content or "" for chunk in read)
    else:
        read = sdk.completions.create(model="m", prompt="x", stream=True)
        texts = (chunk.choices[0].text for chunk in read)
    if kind == "chat":
        assert next(texts) == ""
    assert [next(texts), next(texts)] == ["Hel", ""]
    with pytest.raises(openai.APIError, match=r"The replica is gone\."):
        next(texts)


def test_a_whole_answer_that_failed_raises_what_went_wrong() -> None:
    error = TidegateError(Reason.SERVER_IS_OVERLOADED, "Full.", retry_after_seconds=1.5)
    with pytest.raises(TidegateError) as caught:
        formatter(chat_request()).complete([started(), delta("a"), failed(error)])
    assert (caught.value.reason, caught.value.message) == (error.reason, error.message)
    assert caught.value.retry_after_seconds == 1.5


def test_a_whole_answer_without_an_end_is_an_error() -> None:
    with pytest.raises(TidegateError) as caught:
        formatter(chat_request()).complete([started(), delta("a")])
    assert caught.value.reason is Reason.INTERNAL_ERROR


def test_a_status_tells_the_same_error_again() -> None:
    error = TidegateError(Reason.INVALID_VALUE, "No.", field="stop[1]")
    again = from_status(to_status(error))
    assert (again.reason, again.message, again.field) == (error.reason, error.message, error.field)
    assert again.retry_after_seconds is None


@pytest.mark.parametrize("model", ["\x00place\x00", "m\n\n", 'a"b'])
def test_a_models_name_cannot_disturb_the_stream(model: str) -> None:
    body = stream(chat_request(model=model, stream=True), delta("Hi"), finished())
    first, *_ = chunks(body)
    assert first["model"] == model
    assert first["choices"][0]["delta"]["content"] == "Hi"


def test_models_have_openais_shape() -> None:
    listed = json.loads(models_json(["a", "b"]))
    assert listed["object"] == "list"
    assert [Model.model_validate(one).id for one in listed["data"]] == ["a", "b"]
    assert Model.model_validate_json(models_json(["a", "b"], model="b")).id == "b"
    with pytest.raises(TidegateError) as caught:
        models_json(["a"], model="c")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
