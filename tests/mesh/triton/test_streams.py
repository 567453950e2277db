"""Streams of the real engine through the real Triton."""

from __future__ import annotations

import asyncio
import mmap
import struct
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidegate.model.triton_client import ArenaSlice, EngineRefused, EngineRequest
from tidegate.v1.inference_pb2 import SamplingParameters

PROMPT = np.array([1, 504, 3575, 282, 4649, 314, 260, 2240, 282], np.int32)
GREEDY = SamplingParameters(temperature=0.0)


def request(request_id: str = "r", **fields) -> EngineRequest:
    defaults = {"tokens": PROMPT, "max_tokens": 8, "sampling": GREEDY, "ignore_eos": True}
    return EngineRequest(request_id=request_id, **{**defaults, **fields})


async def tokens_of(client, wanted: EngineRequest) -> list[int]:
    return [token async for output in client.generate(wanted) for token in output.token_ids]


async def test_a_stream_brings_as_many_tokens_as_asked_for(client):
    outputs = [output async for output in client.generate(request(max_tokens=6))]
    assert sum(len(output.token_ids) for output in outputs) == 6
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]


async def test_log_probabilities_do_not_change_the_tokens(client):
    plain = await tokens_of(client, request(max_tokens=4))
    outputs = [output async for output in client.generate(request(max_tokens=4, logprobs=3))]
    assert [token for output in outputs for token in output.token_ids] == plain
    alternatives = [row for output in outputs for row in output.top_token_ids or []]
    assert [len(row) for row in alternatives] == [3] * 4
    assert [row[0] for row in alternatives] == plain


async def test_a_bias_forces_and_forbids_tokens_and_min_p_1_is_greedy(client):
    plain = await tokens_of(client, request())
    forced = SamplingParameters(temperature=0.0, logit_bias={504: 100, 7: -3})
    assert await tokens_of(client, request(sampling=forced)) == [504] * 8
    forbidden = SamplingParameters(temperature=0.0, logit_bias=dict.fromkeys(plain, -100))
    assert not set(await tokens_of(client, request(sampling=forbidden))) & set(plain)
    assert await tokens_of(client, request(sampling=SamplingParameters(min_p=1.0, temperature=2.0))) == plain


async def test_a_resumed_sequence_goes_on_as_it_would_have(client):
    whole = await tokens_of(client, request())
    tokens = np.concatenate([PROMPT, np.array(whole[:3], np.int32)])
    rest = await tokens_of(client, request(tokens=tokens, prior_output_count=3))
    assert whole[3:] == rest


async def test_tokens_in_shared_memory_are_read_in_place(client):
    region = f"tidegate-test-{id(client):x}"
    offset = 256
    path = Path("/dev/shm") / region
    path.write_bytes(bytes(mmap.PAGESIZE))
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[offset : offset + PROMPT.nbytes] = PROMPT.tobytes()
            await client.register_arena(region, mmap.PAGESIZE)
            inline = await tokens_of(client, request())
            assert await tokens_of(client, request(tokens=ArenaSlice(region, offset, PROMPT.nbytes))) == inline
    finally:
        path.unlink()


async def test_a_cancelled_sequence_frees_its_place_and_its_blocks(client, until):
    outputs = client.generate(request(max_tokens=4000))
    await anext(outputs)
    assert client.latest_load.running == 1
    await outputs.aclose()

    async def is_free() -> bool:
        load = await client.load()
        return (load.running, load.free_blocks) == (0, load.total_blocks)

    async with asyncio.timeout(2):
        while not await is_free():
            await asyncio.sleep(0.01)


async def test_a_client_that_vanishes_frees_the_places_of_all_its_sequences(triton, client, connect):
    other = await connect(triton)
    streams = [other.generate(request(f"s{number}", max_tokens=4000)) for number in range(3)]
    for stream in streams:
        await anext(stream)
    await other.close()
    async with asyncio.timeout(3):
        while (await client.load()).running:
            await asyncio.sleep(0.02)


async def test_thirty_two_sequences_run_at_once_and_keep_apart(client):
    wanted = [request(f"c{number}", max_tokens=4 + number % 5) for number in range(32)]
    expected = await tokens_of(client, request(max_tokens=8))
    answers = await asyncio.gather(*(tokens_of(client, one) for one in wanted))
    assert answers == [expected[: one.max_tokens] for one in wanted]


async def test_what_the_engine_cannot_hold_is_refused(client):
    # So many tokens that none is finished before all have come.
    wanted = [request(f"q{number}", max_tokens=32) for number in range(60)]
    results = await asyncio.gather(*(tokens_of(client, one) for one in wanted), return_exceptions=True)
    refused = [result for result in results if isinstance(result, EngineRefused)]
    assert {result.reason for result in refused} == {"QUEUE_FULL"}
    assert len(refused) == 60 - 40
    assert all(len(result) == 32 for result in results if isinstance(result, list))


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"tokens": np.array([10**6], np.int32)}, "INVALID_VALUE", "token_ids[0] is 1000000"),
        ({"tokens": np.array([], np.int32)}, "INVALID_VALUE", "token_ids"),
        ({"tokens": np.ones(9000, np.int32)}, "CONTEXT_LENGTH_EXCEEDED", "9000"),
        ({"max_tokens": 0}, "INVALID_VALUE", "max_tokens is 0"),
        ({"sampling": SamplingParameters(temperature=float("nan"))}, "INVALID_VALUE", "temperature is nan"),
        ({"sampling": SamplingParameters(top_p=0.0)}, "INVALID_VALUE", "top_p is 0"),
        ({"sampling": SamplingParameters(json_schema="{}")}, "INVALID_VALUE", "ignore_eos is True"),
        ({"sampling": SamplingParameters(min_p=2.0)}, "INVALID_VALUE", "min_p is 2.0"),
        ({"sampling": SamplingParameters(logit_bias={10**6: 1})}, "INVALID_VALUE", "logit_bias is 1000000"),
        ({"sampling": SamplingParameters(logit_bias={5: 500})}, "INVALID_VALUE", "logit_bias of token 5 is 500.0"),
        ({"logprobs": 1000}, "INVALID_VALUE", "logprobs is 1000"),
        ({"logprobs": -7}, "INVALID_VALUE", "logprobs is -7"),
    ],
)
async def test_a_bad_value_is_refused_with_its_name(client, changes, reason, words):
    with pytest.raises(EngineRefused) as caught:
        await tokens_of(client, request(**changes))
    assert caught.value.reason == reason
    assert words in caught.value.message


def infer_request(message_id: str, **texts: str) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name="llm", id=message_id)
    for name, text in texts.items():
        message.inputs.add(name=name, datatype="BYTES", shape=[1])
        message.raw_input_contents.append(struct.pack("<I", len(text)) + text.encode())
    return message


async def first_response(triton, message) -> service_pb2.ModelStreamInferResponse:
    async with grpc.aio.insecure_channel(triton.address) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        await call.write(message)
        response = await asyncio.wait_for(call.read(), 5)
        call.cancel()
        return response


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"command": "explode"}, "INVALID_VALUE: command is 'explode'"),
        ({"command": "generate"}, "INVALID_VALUE: token_ids is missing"),
        ({"command": "generate", "subscription": "none"}, "INVALID_VALUE: subscription 'none' is not open"),
    ],
)
async def test_any_triton_client_gets_errors_by_name(triton, client, texts, words):
    response = (await first_response(triton, infer_request("x", **texts))).infer_response
    outputs = dict(zip([output.name for output in response.outputs], response.raw_output_contents, strict=True))
    assert outputs["finish_reason"][4:] == b"error"
    assert outputs["error"][4:].decode().startswith(words)


async def test_an_input_that_the_model_does_not_have_is_refused_by_triton(triton, client):
    response = await first_response(triton, infer_request("x", commando="load"))
    assert "commando" in response.error_message


async def test_the_engines_load_is_among_tritons_metrics(triton, client):
    await tokens_of(client, request(max_tokens=3))
    await asyncio.sleep(0.7)
    address = f"http://127.0.0.1:{triton.server.metrics_port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=5).read().decode())
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("tidegate_engine_"))
    assert float(values['tidegate_engine_generated_tokens_total{model="llm"}']) >= 3
    assert float(values['tidegate_engine_running_sequences{model="llm"}']) == 0
