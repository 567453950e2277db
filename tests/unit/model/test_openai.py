"""OpenAI's endpoints as HTTP bodies over gRPC."""

from __future__ import annotations

import json

import grpc
import pytest
from google.api import httpbody_pb2

from tidegate.common import headers
from tidegate.v1 import inference_pb2, inference_pb2_grpc


def body(**fields) -> httpbody_pb2.HttpBody:
    data = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return httpbody_pb2.HttpBody(content_type="application/json", data=json.dumps(data).encode())


async def collect(call) -> list[httpbody_pb2.HttpBody]:
    return [part async for part in call]


async def test_a_stream_is_server_sent_events_whose_first_message_has_the_type(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("Grüße")) as service:
        call = inference_pb2_grpc.InferenceStub(channel_to(service)).ChatCompletions(body(stream=True))
        parts = await collect(call)
        metadata = dict(await call.initial_metadata())
    assert [part.content_type for part in parts if part.content_type] == ["text/event-stream"]
    assert parts[0].content_type
    events = b"".join(part.data for part in parts).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Grüße"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert metadata["cache-control"] == "no-cache"
    assert int(metadata["openai-processing-ms"]) >= 0


async def test_the_processing_time_has_the_schedulers_queue_in_it(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("a")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.ChatCompletions(body(), metadata=(("x-tidegate-queue-ms", "5000"),))
        await collect(call)
        metadata = dict(await call.initial_metadata())
    assert int(metadata["openai-processing-ms"]) >= 5000


async def test_without_stream_it_is_one_json_object(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("Grüße")) as service:
        call = inference_pb2_grpc.InferenceStub(channel_to(service)).ChatCompletions(body())
        (part,) = await collect(call)
        assert "cache-control" not in dict(await call.initial_metadata())
    assert part.content_type == "application/json"
    answer = json.loads(part.data)
    assert answer["choices"][0]["message"]["content"] == "Grüße"
    assert answer["usage"]["completion_tokens"] == len("Grüße".encode()) + 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_a_brownout_shortens_says_so_in_its_header(start_service, fake_triton, channel_to, stream):
    shortened = ((headers.MAX_TOKENS, "3"), (headers.BROWNOUT, "2"))
    async with start_service(fake_triton("abcdef")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.ChatCompletions(body(stream=stream), metadata=shortened)
        text = b"".join(part.data for part in await collect(call)).decode()
        assert '"finish_reason":"length"' in text
        assert dict(await call.initial_metadata())[headers.BROWNOUT] == "2"
        call = stub.ChatCompletions(body(stream=stream))
        await collect(call)
        assert headers.BROWNOUT not in dict(await call.initial_metadata())


async def test_completions_continue_a_text(start_service, fake_triton, channel_to):
    request = httpbody_pb2.HttpBody(data=b'{"prompt":"ab","max_tokens":2}')
    triton = fake_triton("cdef")
    async with start_service(triton) as service:
        (part,) = await collect(inference_pb2_grpc.InferenceStub(channel_to(service)).Completions(request))
    assert json.loads(part.data)["choices"][0]["text"] == "cd"
    assert triton.prompt_of(0) == list(b"ab")


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"messages":[]}', b'{"messages":[{"role":"x","content":"y"}]}'])
async def test_bad_bodies_are_statuses_that_carry_openais_error(start_service, fake_triton, channel_to, data):
    async with start_service(fake_triton("a")) as service:
        call = inference_pb2_grpc.InferenceStub(channel_to(service)).ChatCompletions(httpbody_pb2.HttpBody(data=data))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = json.loads(dict(caught.value.trailing_metadata())["x-tidegate-error"])["error"]
    assert error["type"] == "invalid_request_error"


async def test_a_prompt_that_is_too_long_names_openais_field(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("a")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.ChatCompletions(body(messages=[{"role": "user", "content": "x" * 5000}])))
    error = json.loads(dict(caught.value.trailing_metadata())["x-tidegate-error"])["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_an_error_in_mid_stream_is_an_error_object_and_nothing_after_it(start_service, fake_triton, channel_to):
    triton = fake_triton("abc" * 50, pace=0.02)
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        parts = await collect(stub.ChatCompletions(body(stream=True), metadata=(("x-tidegate-timeout-ms", "100"),)))
    events = b"".join(part.data for part in parts).decode().strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "error"


async def test_an_error_without_a_stream_is_a_status_even_late(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc" * 50, pace=0.02)) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.ChatCompletions(body(), metadata=(("x-tidegate-timeout-ms", "100"),)))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_models_are_listed_and_unknown_ones_are_not_found(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("a")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        listed = json.loads((await stub.Models(inference_pb2.ModelsRequest())).data)
        assert [model["id"] for model in listed["data"]] == ["bytes"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Models(inference_pb2.ModelsRequest(model="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


LITE = ((headers.LITE, "load"),)


async def test_the_lite_model_answers_for_the_other_where_the_scheduler_says_so(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("ok"), lite_model_name="bytes") as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.ChatCompletions(body(model="large"), metadata=LITE)
        (part,) = await collect(call)
        assert json.loads(part.data)["model"] == "bytes"
        assert dict(await call.initial_metadata())[headers.LITE] == "load"
        call = stub.Generate(inference_pb2.GenerateRequest(text="x", model="large"), metadata=LITE)
        assert (await call.read()).started.model == "bytes"
        assert dict(await call.initial_metadata())[headers.LITE] == "load"
        for metadata in ((), ((headers.LITE, "name"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub.ChatCompletions(body(model="large"), metadata=metadata))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_no_other_model_answers_for_the_lite_one(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("ok"), lite_model_name="small") as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        for metadata in ((), LITE):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub.ChatCompletions(body(model="small"), metadata=metadata))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # What the lite one has no replica for comes here, and nobody is told that the lite one answered.
        call = stub.ChatCompletions(body(model="bytes"), metadata=LITE)
        (part,) = await collect(call)
        assert json.loads(part.data)["model"] == "bytes"
        assert headers.LITE not in dict(await call.initial_metadata())
        listed = json.loads((await stub.Models(inference_pb2.ModelsRequest())).data)
        assert [model["id"] for model in listed["data"]] == ["bytes", "small"]
