"""Prompts in shared memory, and prompts made here because there is no usable handle."""

from __future__ import annotations

import asyncio
import time
from uuid import uuid4

import numpy as np
import pytest

from tidegate.common.arena import Arena, encode_tensor_header, unlink
from tidegate.common.errors import Reason, TidegateError
from tidegate.model.prompts import PromptSource
from tidegate.model.triton_client import ArenaSlice
from tidegate.v1 import inference_pb2, inference_pb2_grpc, tensor_pb2

REGION_BYTES = 1 << 20


@pytest.fixture
def arena():
    region = f"tidegate-test-{uuid4().hex[:8]}"
    arena = Arena.open(region, REGION_BYTES)
    yield arena
    arena.close()
    unlink(region)


def write(arena: Arena, token_ids: list[int], lease_seconds: float = 5.0) -> tensor_pb2.Tensor:
    data = np.asarray(token_ids, dtype=np.int32).tobytes()
    handle = arena.write(data, lease_seconds=lease_seconds, now=time.monotonic())
    return tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_INT32, shape=[len(token_ids)], shared_memory=handle)


def source(model, region: str) -> PromptSource:
    return PromptSource(model, region=region, lease_seconds=30.0, inline_bytes=16_384)


async def hold(prompts: PromptSource, header: str, **fields):
    request = inference_pb2.GenerateRequest(**{"text": "hello", **fields})
    return await prompts.hold(request, tensor_header=header, tenant="t", openai_names=False)


async def test_a_live_handle_is_used_and_released_at_the_end(byte_model, arena):
    prompts = source(byte_model, arena.region)
    tensor = write(arena, [1, 2, 3])
    held = await hold(prompts, encode_tensor_header(tensor), max_tokens=7)
    assert (held.prompt_token_count, held.max_tokens) == (3, 7)
    assert held.handle == tensor.shared_memory
    assert prompts.tokens(held).tolist() == [1, 2, 3]
    prompts.release(held)
    assert arena.usage(time.monotonic()).lease_count == 0


async def test_the_bound_on_tokens_is_what_the_context_leaves(byte_model, arena):
    held = await hold(source(byte_model, arena.region), encode_tensor_header(write(arena, [1] * 4000)), max_tokens=500)
    assert held.max_tokens == byte_model.context_token_count - 4000


def broken_headers(arena: Arena) -> dict[str, str]:
    stale, foreign, wrong_shape = write(arena, [1, 2]), write(arena, [1, 2]), write(arena, [1, 2])
    arena.release(stale.shared_memory)
    foreign.shared_memory.host_id = "elsewhere"
    wrong_shape.shape[0] = 5
    return {
        "absent": "",
        "nonsense": "!!!",
        "stale": encode_tensor_header(stale),
        "foreign": encode_tensor_header(foreign),
        "wrong shape": encode_tensor_header(wrong_shape),
    }


@pytest.mark.parametrize("case", ["absent", "nonsense", "stale", "foreign", "wrong shape"])
async def test_without_a_usable_handle_the_prompt_is_made_here(byte_model, arena, case):
    held = await hold(source(byte_model, arena.region), broken_headers(arena)[case])
    assert held.handle is None
    assert held.token_ids.tolist() == list(b"hello")


async def test_a_truncated_prompt_is_made_here_because_the_client_is_told_how_much_is_left_out(byte_model, arena):
    held = await hold(
        source(byte_model, arena.region),
        encode_tensor_header(write(arena, [1, 2])),
        text="x" * 5000,
        truncation=inference_pb2.TRUNCATION_POLICY_DROP_OLDEST,
    )
    assert held.handle is None
    assert held.truncated_token_count > 900


async def test_a_prompt_that_does_not_fit_is_refused_with_both_lengths(byte_model, arena):
    with pytest.raises(TidegateError) as caught:
        await hold(source(byte_model, arena.region), "", text="x" * 5000)
    assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert "5000" in caught.value.message


async def test_an_unknown_model_is_not_answered_from_a_handle(byte_model, arena):
    with pytest.raises(TidegateError) as caught:
        await hold(source(byte_model, arena.region), encode_tensor_header(write(arena, [1])), model="other")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("token_count", "fields"),
    [
        (2, {"truncation": inference_pb2.TRUNCATION_POLICY_DROP_OLDEST}),
        (2, {"resume": {"token_ids": [97]}}),
        (4096, {}),
    ],
)
async def test_a_handle_that_is_not_used_is_released_at_once(byte_model, arena, token_count, fields):
    held = await hold(source(byte_model, arena.region), encode_tensor_header(write(arena, [1] * token_count)), **fields)
    assert held.handle is None
    assert arena.usage(time.monotonic()).lease_count == 0


async def test_a_bias_beyond_the_vocabulary_is_refused_with_a_handle_too(byte_model, arena):
    beyond = {"logit_bias": {byte_model.vocabulary_size: 1.0}}
    with pytest.raises(TidegateError) as caught:
        await hold(source(byte_model, arena.region), encode_tensor_header(write(arena, [1])), sampling=beyond)
    assert caught.value.field == f"sampling.logit_bias.{byte_model.vocabulary_size}"


async def test_a_handle_whose_request_is_refused_is_released_too(byte_model, arena):
    with pytest.raises(TidegateError):
        await hold(source(byte_model, arena.region), encode_tensor_header(write(arena, [1])), model="other")
    assert arena.usage(time.monotonic()).lease_count == 0


async def test_memory_that_was_replaced_is_not_taken_for_what_triton_has(byte_model, arena):
    prompts = source(byte_model, arena.region)
    told: list[str] = []

    async def register(region: str, byte_count: int) -> None:
        told.append(region)

    await hold(prompts, encode_tensor_header(write(arena, [1])))
    await prompts.register(register)
    await prompts.register(register)
    assert told == [arena.region]
    assert prompts.is_registered_memory()
    unlink(arena.region)
    other = Arena.open(arena.region, REGION_BYTES)
    assert not prompts.is_registered_memory()
    await prompts.register(register)
    assert len(told) == 2
    other.close()


async def test_the_engine_reads_the_prompt_where_it_was_written(start_service, fake_triton, channel_to, arena):
    triton = fake_triton("abc")
    async with start_service(triton, arena_region=arena.region) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        for _ in range(100):
            if triton.registered:
                break
            await asyncio.sleep(0.01)
        tensor = write(arena, [1, 2, 3])
        call = stub.Generate(
            inference_pb2.GenerateRequest(text="hello"), metadata=(("x-tidegate-tensor", encode_tensor_header(tensor)),)
        )
        events = [event async for event in call]
    assert events[0].started.prompt_token_count == 3
    slice_ = triton.requests[0].tokens
    assert slice_ == ArenaSlice(
        region=arena.region, byte_offset=tensor.shared_memory.byte_offset, byte_count=tensor.shared_memory.byte_count
    )
    assert arena.usage(time.monotonic()).lease_count == 0


async def test_a_broken_stream_takes_its_prompt_out_of_the_arena_to_go_on(
    start_service, fake_triton, channel_to, arena
):
    triton = fake_triton("abc", break_after=2)
    async with start_service(triton, arena_region=arena.region, resume_backoff_seconds=0.02) as service:
        for _ in range(100):
            if triton.registered:
                break
            await asyncio.sleep(0.01)
        header = encode_tensor_header(write(arena, [7, 8]))
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.Generate(inference_pb2.GenerateRequest(text="hi"), metadata=(("x-tidegate-tensor", header),))
        text = "".join([event.delta.text async for event in call])
    assert text == "abc"
    assert triton.prompt_of(1) == [7, 8, *b"ab"]


async def test_a_broken_stream_whose_lease_was_lost_prepares_its_prompt_again(
    start_service, fake_triton, channel_to, arena
):
    triton = fake_triton("abc", break_after=2, pace=0.05)
    async with start_service(triton, arena_region=arena.region, resume_backoff_seconds=0.02) as service:
        async with asyncio.timeout(2):
            while not triton.registered:
                await asyncio.sleep(0.01)
        tensor = write(arena, list(b"hello"))
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        metadata = (("x-tidegate-tensor", encode_tensor_header(tensor)),)
        call = stub.Generate(inference_pb2.GenerateRequest(text="hello"), metadata=metadata)
        events = []
        async for event in call:
            events.append(event)
            arena.release(tensor.shared_memory)
    assert "".join(event.delta.text for event in events) == "abc"
    assert isinstance(triton.requests[0].tokens, ArenaSlice)
    assert triton.prompt_of(1) == list(b"helloab")


async def test_a_prompt_whose_lease_was_lost_before_its_turn_is_not_read_from_the_arena(
    start_service, fake_triton, channel_to, arena
):
    triton = fake_triton("abc", pace=0.1, slots=1)
    async with start_service(triton, arena_region=arena.region) as service:
        async with asyncio.timeout(2):
            while not triton.registered:
                await asyncio.sleep(0.01)
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        first = stub.Generate(inference_pb2.GenerateRequest(text="first"))
        await first.read()
        tensor = write(arena, list(b"hello"))
        metadata = (("x-tidegate-tensor", encode_tensor_header(tensor)),)
        second = stub.Generate(inference_pb2.GenerateRequest(text="hello"), metadata=metadata)
        async with asyncio.timeout(2):
            while not service.slots.ledger.waiting_count:
                await asyncio.sleep(0.005)
        arena.release(tensor.shared_memory)
        first.cancel()
        assert "".join([event.delta.text async for event in second]) == "abc"
    assert triton.prompt_of(1) == list(b"hello")
