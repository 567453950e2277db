"""GenerateMany: each prompt is a Generate of its own through the mesh, and the answers interleave."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.model.many import ManyAnswers
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


class EventStub:
    """Answers each Generate with some events."""

    class Generate:
        def __init__(self, request, metadata, timeout) -> None:
            self.events = [inference_pb2.GenerateEvent(delta=inference_pb2.Delta(text="a")) for _ in range(3)]

        async def __aiter__(self):
            for event in self.events:
                await asyncio.sleep(0)
                yield event

        def cancel(self) -> None:
            self.events = []


async def prompts():
    for number in range(3):
        yield prompt(f"r{number}")


def many(write, write_seconds: float = 5.0) -> ManyAnswers:
    return ManyAnswers(
        EventStub, write, limit=2, write_seconds=write_seconds, metadata=(), remaining_seconds=lambda: None
    )


async def test_a_client_that_left_ends_the_stream_without_a_fault():
    async def write(event) -> None:
        raise grpc.aio.UsageError("RPC already finished.")

    async with asyncio.timeout(2):
        await many(write).run(prompts())


async def test_a_client_that_stops_reading_is_ended_after_the_bound():
    async def write(event) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(2):
        with pytest.raises(TidegateError) as caught:
            await many(write, write_seconds=0.05).run(prompts())
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_client_that_stops_reading_loses_its_answers(start_pair, fake_triton):
    triton = fake_triton("0123456789" * 400, slots=8)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
    async with (
        start_pair(triton, fake_triton(""), many_write_seconds=0.2) as pair,
        grpc.aio.insecure_channel(f"127.0.0.1:{pair.front.server.port}", options=options) as channel,
    ):
        call = inference_pb2_grpc.InferenceStub(channel).GenerateMany()
        await call.write(prompt("r", logprobs=20))
        await call.read()
        await asyncio.sleep(1.0)
        async with asyncio.timeout(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while (event := await call.read()) is not grpc.aio.EOF:
                    assert not event.HasField("finished")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
