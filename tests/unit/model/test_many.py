"""GenerateMany: each prompt is a Generate of its own through the mesh, and the answers interleave."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tidegate.v1 import inference_pb2, inference_pb2_grpc


@pytest.fixture
def start_pair(start_service):
    """A service that answers, and in front of it one that splits streams up."""

    def start(triton, front_triton, **changes):
        class Pair:
            async def __aenter__(self):
                self.back_context = start_service(triton)
                self.back = await self.back_context.__aenter__()
                self.front_context = start_service(
                    front_triton, mesh_address=f"127.0.0.1:{self.back.server.port}", **changes
                )
                self.front = await self.front_context.__aenter__()
                return self

            async def __aexit__(self, *error):
                await self.front_context.__aexit__(*error)
                await self.back_context.__aexit__(*error)

        return Pair()

    return start


def prompt(request_id: str, **fields) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(request_id=request_id, text="hello", **fields)


async def answers(stub, requests) -> dict[str, list[inference_pb2.GenerateEvent]]:
    call = stub.GenerateMany()
    for request in requests:
        await call.write(request)
    await call.done_writing()
    found: dict[str, list[inference_pb2.GenerateEvent]] = {}
    async for event in call:
        found.setdefault(event.request_id, []).append(event)
    return found


async def test_answers_interleave_and_each_is_complete(start_pair, fake_triton, channel_to):
    triton = fake_triton("abcdef", pace=0.005, slots=8)
    async with start_pair(triton, fake_triton("")) as pair:
        stub = inference_pb2_grpc.InferenceStub(channel_to(pair.front))
        found = await answers(stub, [prompt(f"r{i}") for i in range(6)])
    assert sorted(found) == [f"r{i}" for i in range(6)]
    for events in found.values():
        assert "".join(event.delta.text for event in events) == "abcdef"
        assert events[-1].finished.reason == inference_pb2.FINISH_REASON_STOP
    assert len(triton.requests) == 6


async def test_one_that_fails_does_not_disturb_the_others(start_pair, fake_triton, channel_to):
    async with start_pair(fake_triton("abc"), fake_triton("")) as pair:
        stub = inference_pb2_grpc.InferenceStub(channel_to(pair.front))
        found = await answers(stub, [prompt("good"), prompt("bad", max_tokens=0), prompt("")])
    assert found["good"][-1].finished.reason == inference_pb2.FINISH_REASON_STOP
    (bad,) = found["bad"]
    assert bad.finished.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "INVALID_VALUE" in str(bad.finished.error)
    (nameless,) = found[""]
    assert "MISSING_REQUIRED_PARAMETER" in str(nameless.finished.error)


async def test_an_id_that_is_under_way_is_refused(start_pair, fake_triton, channel_to):
    async with start_pair(fake_triton("abc", pace=0.05), fake_triton("")) as pair:
        stub = inference_pb2_grpc.InferenceStub(channel_to(pair.front))
        found = await answers(stub, [prompt("same"), prompt("same")])
    reasons = sorted(event.finished.reason for event in found["same"] if event.HasField("finished"))
    assert reasons == [inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_ERROR]


async def test_past_the_bound_no_request_is_read(start_pair, fake_triton, channel_to):
    triton = fake_triton("abcd", pace=0.02, slots=8)
    most = 0
    async with start_pair(triton, fake_triton(""), many_limit=2) as pair:
        stub = inference_pb2_grpc.InferenceStub(channel_to(pair.front))

        async def watch():
            nonlocal most
            while True:
                most = max(most, len(triton.live))
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        await answers(stub, [prompt(f"r{i}") for i in range(6)])
        watching.cancel()
    assert most == 2


async def test_a_client_that_leaves_ends_all_of_its_answers(start_pair, fake_triton, channel_to):
    triton = fake_triton("x" * 500, pace=0.01, slots=8)
    async with start_pair(triton, fake_triton("")) as pair:
        call = inference_pb2_grpc.InferenceStub(channel_to(pair.front)).GenerateMany()
        for i in range(3):
            await call.write(prompt(f"r{i}"))
        await call.read()
        call.cancel()
        async with asyncio.timeout(1):
            while triton.live or pair.back.slots.ledger.running_count:
                await asyncio.sleep(0.005)
    assert len(triton.cancelled) == len(triton.requests)
