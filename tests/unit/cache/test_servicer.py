"""The cache over gRPC: recorded once, found by its own tenant until it expires, replayed on every surface."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry

from tidegate.v1 import cache_pb2, cache_pb2_grpc, inference_pb2, inference_pb2_grpc

KEY = bytes(range(32))
TIMEOUT_SECONDS = 5

CHAT = {"model": "m", "messages": [{"role": "user", "content": "capital of France?"}], "temperature": 0}


def answer(text: str = "Paris") -> cache_pb2.Answer:
    made = cache_pb2.Answer(model="m")
    made.deltas.add(text=text[:3], token_ids=[1, 2])
    made.deltas.add(text=text[3:], token_ids=[3])
    made.finished.reason = inference_pb2.FINISH_REASON_STOP
    made.finished.usage.prompt_token_count = 7
    made.finished.usage.completion_token_count = 4
    return made


async def record(channel: grpc.aio.Channel, *, tenant: str = "a", **fields: Any) -> cache_pb2.RecordResponse:
    request = cache_pb2.RecordRequest(answer_key=KEY, tenant=tenant, **({"answer": answer()} | fields))
    return await cache_pb2_grpc.CacheStub(channel).Record(request, timeout=TIMEOUT_SECONDS)


async def look_up(channel: grpc.aio.Channel, *, tenant: str = "a", key: bytes = KEY) -> tuple[bool, str]:
    request = cache_pb2.LookUpRequest(answer_key=key, tenant=tenant)
    response = await cache_pb2_grpc.CacheStub(channel).LookUp(request, timeout=TIMEOUT_SECONDS)
    return response.hit, response.tier


def replay_metadata(tenant: str = "a", key: str = KEY.hex()) -> tuple[tuple[str, str], ...]:
    return (("x-tidegate-answer-key", key), ("x-tidegate-tenant", tenant), ("x-request-id", "new-id"))


def chat_call(channel: grpc.aio.Channel, body: dict[str, Any] | bytes, **metadata: str) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return inference_pb2_grpc.InferenceStub(channel).ChatCompletions(
        httpbody_pb2.HttpBody(content_type="application/json", data=data),
        metadata=replay_metadata(**metadata),
        timeout=TIMEOUT_SECONDS,
    )


async def test_a_recorded_answer_is_found_until_it_expires(channel: grpc.aio.Channel, clock: Any) -> None:
    assert await look_up(channel) == (False, "")
    assert await record(channel) == cache_pb2.RecordResponse(stored=True)
    assert await look_up(channel) == (True, "memory")
    clock.now += 599
    assert await look_up(channel) == (True, "memory")
    clock.now += 3
    assert await look_up(channel) == (False, "")


async def test_a_record_may_ask_for_less_time_but_not_for_more(channel: grpc.aio.Channel, clock: Any) -> None:
    asked = cache_pb2.RecordRequest()
    asked.time_to_live.FromSeconds(10)
    await record(channel, tenant="short", time_to_live=asked.time_to_live)
    asked.time_to_live.FromSeconds(100_000)
    await record(channel, tenant="long", time_to_live=asked.time_to_live)
    clock.now += 11
    assert await look_up(channel, tenant="short") == (False, "")
    clock.now += 600
    assert await look_up(channel, tenant="long") == (False, "")


async def test_another_tenant_finds_nothing(channel: grpc.aio.Channel) -> None:
    await record(channel, tenant="a")
    assert await look_up(channel, tenant="b") == (False, "")
    call = chat_call(channel, CHAT, tenant="b")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_an_incomplete_or_too_large_answer_is_left_out_and_said_so(
    channel: grpc.aio.Channel, registry: CollectorRegistry
) -> None:
    assert (await record(channel, answer=cache_pb2.Answer(model="m"))).reason == "NOT_COMPLETE"
    assert (await record(channel, answer=answer("x" * 20_000))).reason == "TOO_LARGE"
    assert await look_up(channel) == (False, "")
    for outcome in ("not_complete", "too_large"):
        assert registry.get_sample_value("tidegate_cache_records_total", {"outcome": outcome}) == 1


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
async def test_a_key_that_is_none_is_refused(channel: grpc.aio.Channel, key: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await look_up(channel, key=key)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_clear_forgets_one_tenants_or_all(channel: grpc.aio.Channel) -> None:
    stub = cache_pb2_grpc.CacheStub(channel)
    for tenant in "abc":
        await record(channel, tenant=tenant)
    assert (await stub.Clear(cache_pb2.ClearRequest(tenant="a"), timeout=TIMEOUT_SECONDS)).answer_count == 1
    assert await look_up(channel, tenant="a") == (False, "")
    assert await look_up(channel, tenant="b") == (True, "memory")
    assert (await stub.Clear(cache_pb2.ClearRequest(), timeout=TIMEOUT_SECONDS)).answer_count == 2


async def test_a_typed_replay_has_the_new_id_and_the_recorded_text(channel: grpc.aio.Channel) -> None:
    await record(channel)
    request = inference_pb2.GenerateRequest(request_id="mine", text="capital of France?")
    call = inference_pb2_grpc.InferenceStub(channel).Generate(
        request, metadata=replay_metadata(), timeout=TIMEOUT_SECONDS
    )
    events = [event async for event in call]
    assert dict(await call.initial_metadata())["x-tidegate-cache"] == "hit"
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "finished"]
    assert {event.request_id for event in events} == {"mine"}
    assert events[0].started.cached
    assert "".join(event.delta.text for event in events) == "Paris"
    assert events[3].finished.usage.completion_token_count == 4


async def test_a_typed_replay_without_an_id_of_its_own_takes_the_meshs(channel: grpc.aio.Channel) -> None:
    await record(channel)
    call = inference_pb2_grpc.InferenceStub(channel).Generate(
        inference_pb2.GenerateRequest(text="x"), metadata=replay_metadata(), timeout=TIMEOUT_SECONDS
    )
    assert {event.request_id async for event in call} == {"new-id"}


async def test_a_chat_is_replayed_as_server_sent_events(channel: grpc.aio.Channel) -> None:
    await record(channel)
    call = chat_call(channel, CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    parts = [part async for part in call]
    assert dict(await call.initial_metadata())["x-tidegate-cache"] == "hit"
    assert {part.content_type for part in parts} == {"text/event-stream"}
    lines = b"".join(part.data for part in parts).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "Paris"
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-new-id"}
    assert chunks[-1]["usage"]["completion_tokens"] == 4


async def test_a_chat_is_replayed_as_json(channel: grpc.aio.Channel) -> None:
    await record(channel)
    parts = [part async for part in chat_call(channel, CHAT)]
    assert [part.content_type for part in parts] == ["application/json"]
    body = json.loads(parts[0].data)
    assert body["choices"][0]["message"]["content"] == "Paris"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert (body["id"], body["created"]) == ("chatcmpl-new-id", 1_700_000_000)


async def test_a_completion_is_replayed_as_json(channel: grpc.aio.Channel) -> None:
    await record(channel)
    data = json.dumps({"model": "m", "prompt": "The capital", "temperature": 0}).encode()
    call = inference_pb2_grpc.InferenceStub(channel).Completions(
        httpbody_pb2.HttpBody(data=data), metadata=replay_metadata(), timeout=TIMEOUT_SECONDS
    )
    parts = [part async for part in call]
    assert json.loads(parts[0].data)["choices"][0]["text"] == "Paris"


async def test_an_answer_that_was_looked_up_is_there_for_the_replay_though_it_expired(
    channel: grpc.aio.Channel, clock: Any
) -> None:
    await record(channel)
    clock.now += 599.5
    assert await look_up(channel) == (True, "memory")
    clock.now += 1.0
    assert [part async for part in chat_call(channel, CHAT)]


@pytest.mark.parametrize("key", [KEY.hex(), "", "zz", "abcd"])
async def test_an_answer_that_vanished_is_unavailable_before_the_first_byte(
    channel: grpc.aio.Channel, registry: CollectorRegistry, key: str
) -> None:
    call = chat_call(channel, CHAT, key=key)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "x-tidegate-cache" not in dict(caught.value.initial_metadata() or ())
    assert registry.get_sample_value("tidegate_cache_replays_total", {"outcome": "vanished"}) == 1


async def test_a_bad_body_is_told_as_the_model_would(channel: grpc.aio.Channel) -> None:
    await record(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat_call(channel, b"{").read()
    trailing = dict(caught.value.trailing_metadata() or ())
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert json.loads(trailing["x-tidegate-error"])["error"]["code"] == "invalid_json"
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "INVALID_JSON"


async def test_models_and_many_prompts_are_not_served_here(channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Models(inference_pb2.ModelsRequest(), timeout=TIMEOUT_SECONDS)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GenerateMany(iter([inference_pb2.GenerateRequest()]), timeout=TIMEOUT_SECONDS).read()
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_record_goes_through_when_the_cache_is_full_of_old_answers(
    channel: grpc.aio.Channel, registry: CollectorRegistry
) -> None:
    for tenant in range(40):
        assert (await record(channel, tenant=f"t{tenant}", answer=answer("x" * 5000))).stored
    used = registry.get_sample_value("tidegate_cache_bytes", {"tier": "memory"})
    assert used is not None and 90_000 < used <= 100_000
    assert await look_up(channel, tenant="t0") == (False, "")
    assert await look_up(channel, tenant="t39") == (True, "memory")
