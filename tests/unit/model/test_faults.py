"""Faults of the service's own: what the client is told of one, and that the process does not go on without a part."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tidegate.v1 import inference_pb2, inference_pb2_grpc


def reason_of(error: grpc.aio.AioRpcError) -> str:
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info.reason


async def test_a_fault_is_an_internal_error_that_says_nothing_of_the_code(
    start_service, fake_triton, channel_to, monkeypatch
):
    async def fail(*arguments, **options):
        raise ZeroDivisionError("secret text")

    async with start_service(fake_triton("a")) as service:
        monkeypatch.setattr(service._prompts, "hold", fail)
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(inference_pb2.GenerateRequest(text="hello")).read()
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")
    assert "secret" not in caught.value.details()


async def test_a_fault_in_the_tokens_is_not_told_in_pythons_words(start_service, fake_triton, channel_to):
    triton = fake_triton("a")

    def fail(request):
        raise ZeroDivisionError("secret text")

    triton.generate = fail
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(inference_pb2.GenerateRequest(text="hello")).read()
    assert reason_of(caught.value) == "INTERNAL_ERROR"
    assert "secret" not in caught.value.details()
    assert "secret" not in json.dumps([str(value) for value in dict(caught.value.trailing_metadata()).values()])


@pytest.mark.parametrize("part", ["_watch", "slots", "_prompts", "_recorder"])
async def test_a_part_that_should_run_for_ever_and_fails_is_told_as_a_fault(start_service, fake_triton, part):
    faults: list[BaseException] = []

    async def fail() -> None:
        raise ZeroDivisionError(part)

    def spoil(service) -> None:
        getattr(service, part).run = fail

    async with start_service(fake_triton("a"), before_start=spoil, on_fault=faults.append):
        async with asyncio.timeout(2):
            while not faults:
                await asyncio.sleep(0.005)
    assert [str(fault) for fault in faults] == [part]


async def test_a_fault_of_tritons_client_is_told_too(start_service, fake_triton):
    faults: list[BaseException] = []
    triton = fake_triton("a")
    async with start_service(triton, on_fault=faults.append):
        for listener in triton.on_fault:
            listener(ZeroDivisionError("keeper"))
    assert [str(fault) for fault in faults] == ["keeper"]
