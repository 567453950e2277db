"""Prepare over gRPC: every request is answered once, faults stay with their request, tokens lie in the arena."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from tidegate.common.arena import Arena
from tidegate.common.errors import TidegateError
from tidegate.preprocess.preparation import prepare
from tidegate.text.model_files import TextModel
from tidegate.text.prompt import prepare_prompt
from tidegate.v1 import inference_pb2, preprocess_pb2, tensor_pb2

TIMEOUT_SECONDS = 20
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * 200

CHAT = preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS
COMPLETION = preprocess_pb2.BODY_KIND_COMPLETIONS
GENERATE = preprocess_pb2.BODY_KIND_GENERATE


def prepare_request(
    body: dict[str, Any] | bytes, kind: int = CHAT, *, request_id: str = "r", tenant: str = "a"
) -> preprocess_pb2.PrepareRequest:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return preprocess_pb2.PrepareRequest(
        request_id=request_id, body_kind=preprocess_pb2.BodyKind.ValueType(kind), body=data, tenant=tenant
    )


async def exchange(stub: Any, *requests: preprocess_pb2.PrepareRequest) -> dict[str, preprocess_pb2.PrepareResponse]:
    """Sends all, half-closes, and returns the answers by id."""
    call = stub.Prepare(iter(requests), timeout=TIMEOUT_SECONDS)
    responses = [response async for response in call]
    assert len(responses) == len({response.request_id for response in responses})
    return {response.request_id: response for response in responses}


async def prepared(stub: Any, body: dict[str, Any] | bytes, kind: int = CHAT, **fields: str) -> Any:
    response = (await exchange(stub, prepare_request(body, kind, **fields)))["r"]
    assert response.WhichOneof("outcome") == "prepared", response
    return response.prepared


async def refused(stub: Any, body: dict[str, Any] | bytes, kind: int = CHAT) -> tuple[str, str]:
    response = (await exchange(stub, prepare_request(body, kind)))["r"]
    assert response.WhichOneof("outcome") == "error", response
    return response.error.reason, response.error.field


def tokens_of(arena: Arena, tensor: tensor_pb2.Tensor) -> list[int]:
    assert tensor.data_type == tensor_pb2.DATA_TYPE_INT32
    data = arena.read(tensor.shared_memory, time.monotonic())
    values: list[int] = np.frombuffer(data, np.int32).tolist()
    assert list(tensor.shape) == [len(values)]
    return values


async def test_a_chat_is_prepared_as_the_one_path_does_it(stub: Any, arena: Arena, model: TextModel) -> None:
    body = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "stream": True, "service_tier": "priority"}
    answer = await prepared(stub, body)
    generate = inference_pb2.GenerateRequest(max_tokens=9, service_class=inference_pb2.SERVICE_CLASS_REALTIME)
    generate.chat.messages.add(**MESSAGES[0])
    generate.sampling.temperature = 0
    expected = prepare_prompt(generate, model, "a")
    assert tokens_of(arena, answer.tokens) == expected.token_ids.tolist()
    assert answer.prompt_token_count == expected.prompt_token_count
    assert tuple(answer.block_hashes) == expected.block_hashes
    assert answer.answer_key == expected.answer_key != b""
    assert (answer.model, answer.max_tokens, answer.stream) == ("smollm2-135m-instruct", 9, True)
    assert answer.service_class == inference_pb2.SERVICE_CLASS_REALTIME


async def test_a_completion_is_prepared(stub: Any, arena: Arena, model: TextModel) -> None:
    answer = await prepared(stub, {"prompt": "The capital of France is"}, COMPLETION)
    assert model.tokenizer.decode(tokens_of(arena, answer.tokens)) == "The capital of France is"
    assert not answer.stream


async def test_a_typed_request_is_prepared_and_always_streams(stub: Any, arena: Arena) -> None:
    generate = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(token_ids=range(100, 140)))
    answer = await prepared(stub, generate.SerializeToString(), GENERATE)
    assert tokens_of(arena, answer.tokens) == list(range(100, 140))
    assert answer.stream


async def test_the_lite_model_prepares_what_asks_for_it(model: TextModel) -> None:
    lite = dataclasses.replace(model, name="lite", context_token_count=50)
    for name, expected in (
        ("lite", 50),
        ("smollm2-135m-instruct", model.context_token_count),
        ("", model.context_token_count),
    ):
        request = prepare_request({"messages": MESSAGES, **({"model": name} if name else {})})
        prompt = prepare(request, model, lite).prompt
        assert (prompt.model, prompt.prompt_token_count + prompt.max_tokens) == (name or model.name, expected)
    with pytest.raises(TidegateError, match="'other' does not exist"):
        prepare(prepare_request({"messages": MESSAGES, "model": "other"}), model, lite)


async def test_what_another_vocabulary_can_read_is_told(stub: Any) -> None:
    assert (await prepared(stub, {"messages": MESSAGES})).is_portable
    tokens = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(token_ids=[1, 2]))
    resumed = inference_pb2.GenerateRequest(text="The tide", resume=inference_pb2.TokenIds(token_ids=[1]))
    for request in (tokens, resumed):
        assert not (await prepared(stub, request.SerializeToString(), GENERATE)).is_portable


async def test_tenants_share_neither_hashes_nor_keys(stub: Any) -> None:
    body = {"messages": MESSAGES, "temperature": 0}
    first, second = await prepared(stub, body, tenant="a"), await prepared(stub, body, tenant="b")
    assert first.answer_key != second.answer_key
    assert set(first.block_hashes).isdisjoint(second.block_hashes)


async def test_an_answer_that_is_not_deterministic_has_no_key(stub: Any) -> None:
    assert (await prepared(stub, {"messages": MESSAGES, "temperature": 0.7})).answer_key == b""


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (b"{", CHAT, ("INVALID_JSON", "")),
        (b"\xff\xfe", CHAT, ("INVALID_JSON", "")),
        ({"messages": []}, CHAT, ("INVALID_VALUE", "messages")),
        ({"messages": [{"role": "king", "content": "x"}]}, CHAT, ("INVALID_VALUE", "messages[0].role")),
        ({"messages": MESSAGES, "model": "other"}, CHAT, ("MODEL_NOT_FOUND", "model")),
        ({"messages": MESSAGES, "no_such": 1}, CHAT, ("UNKNOWN_PARAMETER", "no_such")),
        ({"prompt": LONG_TEXT * 10}, COMPLETION, ("CONTEXT_LENGTH_EXCEEDED", "prompt")),
        (b"\xff\xff", GENERATE, ("INVALID_VALUE", "")),
        (b"", GENERATE, ("MISSING_REQUIRED_PARAMETER", "prompt")),
        (b"{}", preprocess_pb2.BODY_KIND_UNSPECIFIED, ("INVALID_VALUE", "body_kind")),
    ],
)
async def test_what_a_client_gets_wrong_is_a_refusal_with_reason_and_field(
    stub: Any, registry: CollectorRegistry, body: dict[str, Any] | bytes, kind: int, expected: tuple[str, str]
) -> None:
    assert await refused(stub, body, kind) == expected
    assert registry.get_sample_value("tidegate_preprocess_refusals_total", {"reason": expected[0]}) == 1


async def test_a_kind_that_is_not_known_yet_is_refused(stub: Any) -> None:
    request = preprocess_pb2.PrepareRequest.FromString(prepare_request(b"{}").SerializeToString() + b"\x10\x63")
    assert (await exchange(stub, request))["r"].error.reason == "INVALID_VALUE"


async def test_faults_do_not_disturb_the_others_on_the_stream(stub: Any) -> None:
    requests = [
        prepare_request(b"{" if number % 3 == 0 else {"messages": MESSAGES}, request_id=str(number))
        for number in range(60)
    ]
    answers = await exchange(stub, *requests)
    assert len(answers) == 60
    outcomes = {number: answers[str(number)].WhichOneof("outcome") for number in range(60)}
    assert outcomes == {number: "error" if number % 3 == 0 else "prepared" for number in range(60)}


async def test_large_and_small_bodies_mixed_are_all_answered_past_the_window(
    stub: Any, registry: CollectorRegistry
) -> None:
    requests = [
        prepare_request(
            {"prompt": LONG_TEXT if number % 2 else "short", "temperature": 0}, COMPLETION, request_id=str(number)
        )
        for number in range(40)
    ]
    answers = await exchange(stub, *requests)
    assert {answer.WhichOneof("outcome") for answer in answers.values()} == {"prepared"}
    assert len({answers[str(number)].prepared.answer_key for number in range(1, 40, 2)}) == 1
    assert registry.get_sample_value("tidegate_preprocess_in_flight") == 0


async def test_a_small_prompt_does_not_wait_for_a_large_one(stub: Any) -> None:
    call = stub.Prepare(timeout=TIMEOUT_SECONDS)
    # So large that the small one is sent long before they are done; that they do not fit is told only then.
    for number in range(4):
        await call.write(prepare_request({"prompt": LONG_TEXT * 20}, COMPLETION, request_id=f"large{number}"))
    await call.write(prepare_request({"prompt": "short"}, COMPLETION, request_id="small"))
    await call.done_writing()
    order = [response.request_id async for response in call]
    assert order.index("small") < 4


async def test_a_full_arena_sends_prompts_on_without_tokens(
    stub: Any, arena: Arena, registry: CollectorRegistry
) -> None:
    while arena.write(bytes(10_000), lease_seconds=60, now=time.monotonic()) is not None:
        pass
    answer = await prepared(stub, {"prompt": LONG_TEXT}, COMPLETION)
    assert not answer.HasField("tokens")
    assert answer.prompt_token_count > 1000
    assert registry.get_sample_value("tidegate_preprocess_arena_full_total") == 1


async def test_tokens_are_leased_for_the_time_that_is_set(stub: Any, arena: Arena) -> None:
    answer = await prepared(stub, {"messages": MESSAGES})
    handle = answer.tokens.shared_memory
    arena.verify(handle, time.monotonic() + 59)
    assert arena.reclaim(time.monotonic() + 62) == 1


async def test_a_stream_that_is_cancelled_leaves_the_service_working(stub: Any, registry: CollectorRegistry) -> None:
    call = stub.Prepare(timeout=TIMEOUT_SECONDS)
    for number in range(6):
        await call.write(prepare_request({"prompt": LONG_TEXT}, COMPLETION, request_id=str(number)))
    call.cancel()
    await prepared(stub, {"messages": MESSAGES})
    async with asyncio.timeout(5):
        while registry.get_sample_value("tidegate_preprocess_streams") != 0:
            await asyncio.sleep(0.01)
    assert registry.get_sample_value("tidegate_preprocess_in_flight") == 0


async def test_a_stream_whose_answers_are_not_taken_is_not_read_for_ever(
    stub: Any, registry: CollectorRegistry
) -> None:
    stuck = stub.Prepare(timeout=TIMEOUT_SECONDS)
    generate = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(token_ids=[5] * 2000))
    # The id comes back, so each answer is large, and what is not taken soon fills the connection.
    request = prepare_request(generate.SerializeToString(), GENERATE, request_id="x" * 50_000)

    async def write_without_reading() -> None:
        for _ in range(2000):
            await stuck.write(request)

    def read_count() -> float:
        return registry.get_sample_value("tidegate_preprocess_duration_seconds_count", {"body_kind": "generate"}) or 0

    writing = asyncio.create_task(write_without_reading())
    async with asyncio.timeout(10):
        seen = -1.0
        while seen != read_count():
            seen = read_count()
            await asyncio.sleep(0.3)
    assert 0 < read_count() < 2000
    assert (await prepared(stub, {"messages": MESSAGES})).prompt_token_count > 0
    writing.cancel()
    stuck.cancel()


async def test_durations_and_tokens_are_counted(stub: Any, registry: CollectorRegistry) -> None:
    answer = await prepared(stub, {"messages": MESSAGES})
    kind = {"body_kind": "chat_completions"}
    assert registry.get_sample_value("tidegate_preprocess_duration_seconds_count", kind) == 1
    assert registry.get_sample_value("tidegate_preprocess_prompt_tokens_sum") == answer.prompt_token_count


async def test_a_fault_of_our_own_is_an_internal_error_and_the_stream_goes_on(stub: Any, arena: Arena) -> None:
    arena.write = lambda *_, **__: 1 / 0  # type: ignore[method-assign, assignment]
    answers = await exchange(stub, prepare_request({"messages": MESSAGES}), prepare_request(b"{", request_id="bad"))
    assert answers["r"].error.reason == "INTERNAL_ERROR"
    assert "zero" not in answers["r"].error.message
    assert answers["bad"].error.reason == "INVALID_JSON"


async def test_the_stream_ends_when_the_client_half_closes(stub: Any) -> None:
    call = stub.Prepare(iter([prepare_request({"messages": MESSAGES})]), timeout=TIMEOUT_SECONDS)
    assert len([response async for response in call]) == 1
    assert await call.code() == grpc.StatusCode.OK


async def test_tokens_that_are_given_back_are_free_again(stub: Any, arena: Arena) -> None:
    handles = [(await prepared(stub, {"messages": MESSAGES})).tokens.shared_memory for _ in range(3)]
    carrier = preprocess_pb2.PrepareRequest(releases=handles[:1])
    prompt = prepare_request(b"{")
    prompt.releases.extend(handles[:2])
    assert list(await exchange(stub, carrier, prompt)) == ["r"]
    assert arena.reclaim(time.monotonic()) == 2
    arena.verify(handles[2], time.monotonic())
