"""Generate over real gRPC, with an engine that says a given text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import generate_latest

from tidegate.common import headers
from tidegate.v1 import inference_pb2, inference_pb2_grpc

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
"""So that what gRPC itself keeps for a reader does not hide that nobody reads."""

GREEDY = inference_pb2.SamplingParameters(temperature=0)


def ask(text: str = "hello", **fields) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(request_id="r1", text=text, sampling=GREEDY, **fields)


async def collect(stub, request, **call):
    return [event async for event in stub.Generate(request, **call)]


def text_of(events) -> str:
    return "".join(event.delta.text for event in events)


def tokens_of(events) -> list[int]:
    return [token for event in events for token in event.delta.token_ids]


def reason_of(error: grpc.aio.AioRpcError) -> str:
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info.reason


async def test_an_answer_is_started_deltas_finished_with_exact_usage(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("Grüße, 世界")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask())
    assert events[0].WhichOneof("event") == "started"
    assert events[0].started == inference_pb2.Started(model="bytes", prompt_token_count=5)
    assert {event.request_id for event in events} == {"r1"}
    assert text_of(events) == "Grüße, 世界"
    assert bytes(tokens_of(events)).decode() == "Grüße, 世界"
    finished = events[-1].finished
    assert finished.reason == inference_pb2.FINISH_REASON_STOP
    assert finished.usage == inference_pb2.Usage(
        prompt_token_count=5, completion_token_count=len("Grüße, 世界".encode()) + 1
    )
    assert finished.HasField("time_to_first_token")


async def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(start_service, fake_triton, channel_to):
    triton = fake_triton("one two STOP three")
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(stop=["STOP"]))
        assert text_of(events) == "one two "
        assert events[-1].finished.reason == inference_pb2.FINISH_REASON_STOP
        assert events[-1].finished.usage.completion_token_count == len("one two STOP")
        assert triton.cancelled == [triton.requests[0].request_id]
        assert service.slots.ledger.running_count == 0


async def test_what_could_be_a_stop_but_is_not_comes_out_at_the_end(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("one ST")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(stop=["STOP"]))
    assert text_of(events) == "one ST"


async def test_max_tokens_ends_it_with_length(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abcdef")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(max_tokens=3))
    assert text_of(events) == "abc"
    assert events[-1].finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert events[-1].finished.usage.completion_token_count == 3


async def test_an_answer_that_a_brownout_shortens_is_cut_and_says_so(start_service, fake_triton, channel_to):
    shortened = ((headers.MAX_TOKENS, "3"), (headers.BROWNOUT, "2"))
    async with start_service(fake_triton("abcdef")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.Generate(ask(max_tokens=5), metadata=shortened)
        events = [event async for event in call]
        assert text_of(events) == "abc"
        assert events[-1].finished.reason == inference_pb2.FINISH_REASON_LENGTH
        assert dict(await call.initial_metadata())[headers.BROWNOUT] == "2"
        assert text_of(await collect(stub, ask(max_tokens=2), metadata=shortened)) == "ab"
        call = stub.Generate(ask(max_tokens=5))
        assert text_of([event async for event in call]) == "abcde"
        assert headers.BROWNOUT not in dict(await call.initial_metadata())


async def test_an_absent_seed_is_drawn_and_a_given_one_kept(start_service, fake_triton, channel_to):
    triton = fake_triton("a")
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        await collect(stub, inference_pb2.GenerateRequest(text="x"))
        await collect(stub, inference_pb2.GenerateRequest(text="x"))
        await collect(stub, inference_pb2.GenerateRequest(text="x", sampling={"seed": 7}))
    seeds = [request.sampling.seed for request in triton.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2] == 7


async def test_logprobs_have_an_entry_a_token_with_alternatives(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("ab")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(logprobs=2))
    entries = [entry for event in events for entry in event.delta.logprobs]
    assert [entry.text for entry in entries] == [b"a", b"b"]
    assert [other.text for other in entries[1].alternatives] == [b"b", b"A"]


async def test_bad_input_is_a_status_with_the_reason_and_the_field(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("a")) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, ask(max_tokens=0))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_of(caught.value) == "INVALID_VALUE"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, ask(model="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_deadline_before_the_first_token_is_a_status(start_service, fake_triton, channel_to):
    triton = fake_triton("a", pace=5)
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, ask(), metadata=(("x-tidegate-timeout-ms", "80"),))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert reason_of(caught.value) == "DEADLINE_EXCEEDED"
        assert not triton.live
        assert service.slots.ledger.running_count == 0


async def test_the_way_from_the_scheduler_counts_and_what_comes_too_late_is_never_begun(
    start_service, fake_triton, channel_to
):
    triton = fake_triton("a")
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))

        def sent(seconds_ago: float) -> Sequence[tuple[str, str]]:
            return ((headers.TIMEOUT_MS, "5000"), (headers.SENT, f"{time.time() - seconds_ago:.6f}"))

        assert text_of(await collect(stub, ask(), metadata=sent(0))) == "a"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, ask(), metadata=sent(20))
        assert reason_of(caught.value) == "DEADLINE_EXCEEDED"
        assert len(triton.requests) == 1
        assert text_of(await collect(stub, ask(), metadata=sent(0))) == "a"


async def test_a_deadline_later_is_a_last_event_with_the_error(start_service, fake_triton, channel_to):
    triton = fake_triton("abcdefghij" * 10, pace=0.02)
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(), metadata=(("x-tidegate-timeout-ms", "150"),))
        finished = events[-1].finished
        assert finished.reason == inference_pb2.FINISH_REASON_ERROR
        assert finished.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert 0 < len(text_of(events)) < 20
        assert not triton.live


async def test_a_client_that_leaves_frees_its_slot_long_before_the_answer_would_end(
    start_service, fake_triton, channel_to
):
    triton = fake_triton("x" * 1000, pace=0.01)
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.Generate(ask())
        await call.read()
        call.cancel()
        left_at = time.monotonic()
        while triton.live or service.slots.ledger.running_count:
            await asyncio.sleep(0.002)
            assert time.monotonic() - left_at < 2
        assert triton.cancelled


async def test_a_slow_reader_gets_fewer_deltas_and_the_same_text(start_service, fake_triton):
    text = "0123456789" * 300
    async with (
        start_service(fake_triton(text)) as service,
        grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}", options=SMALL_WINDOW) as channel,
    ):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(ask(logprobs=20))
        events = []
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
            if len(events) == 3:
                await asyncio.sleep(0.5)
    assert text_of(events) == text
    assert len(tokens_of(events)) == len(text)
    assert len(events) < len(text) / 2
    assert max(len(event.delta.token_ids) for event in events) > 100


async def test_a_reader_that_stops_is_kept_no_more_than_the_bound_and_holds_up_nobody_else(start_service, fake_triton):
    text = "0123456789" * 400
    async with (
        start_service(fake_triton(text), stream_buffer_token_limit=16) as service,
        grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}", options=SMALL_WINDOW) as stuck_channel,
        grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}") as channel,
    ):
        stuck = inference_pb2_grpc.InferenceStub(stuck_channel).Generate(ask(logprobs=20))
        await stuck.read()
        async with asyncio.timeout(20):
            events = await collect(inference_pb2_grpc.InferenceStub(channel), ask())
        assert text_of(events) == text
        rest = []
        while (event := await stuck.read()) is not grpc.aio.EOF:
            rest.append(event)
        assert max(len(event.delta.token_ids) for event in rest) == 16


@pytest.mark.parametrize(("service_class", "most"), [("batch", 3), ("standard", 41), ("realtime", 41)])
async def test_a_batch_answer_comes_in_few_pieces(start_service, fake_triton, channel_to, service_class, most):
    text = "0123456789" * 4
    triton = fake_triton(text, pace=0.005, wait_after=1)
    async with start_service(triton, batch_delta_seconds=10) as service, asyncio.timeout(5):
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.Generate(ask(), metadata=((headers.SERVICE_CLASS, service_class),))
        events = [await call.read(), await call.read()]
        triton.go.set()
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
    assert text_of(events) == text
    deltas = [event for event in events if event.HasField("delta")]
    assert most / 2 < len(deltas) + 1 <= most
    assert events[1].delta.text == text[0]


async def test_pieces_of_a_batch_answer_are_no_larger_than_what_is_kept_for_a_reader(
    start_service, fake_triton, channel_to
):
    text = "0123456789" * 10
    settings = {"batch_delta_seconds": 10, "stream_buffer_token_limit": 16}
    async with start_service(fake_triton(text), **settings) as service, asyncio.timeout(5):
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(), metadata=((headers.SERVICE_CLASS, "batch"),))
    assert text_of(events) == text
    assert 10 < max(len(event.delta.token_ids) for event in events) <= 16


async def test_pieces_of_a_batch_answer_keep_their_distance(start_service, fake_triton, channel_to):
    text = "0123456789" * 4
    async with start_service(fake_triton(text, pace=0.01), batch_delta_seconds=0.1) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(), metadata=((headers.SERVICE_CLASS, "batch"),))
    assert text_of(events) == text
    assert 3 <= len([event for event in events if event.HasField("delta")]) <= 10


async def test_without_a_ready_engine_it_refuses_and_health_says_so(start_service, fake_triton, channel_to):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    triton = fake_triton("a")
    async with start_service(triton) as service:
        channel = channel_to(service)
        health = health_pb2_grpc.HealthStub(channel)
        await asyncio.sleep(0.1)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        triton.set_ready(False)
        await asyncio.sleep(0.1)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, ask())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "REPLICA_UNAVAILABLE"


async def test_a_reader_that_never_reads_gives_its_slot_back_and_is_cut_off_after_its_deadline(
    start_service, fake_triton
):
    triton = fake_triton("0123456789" * 400)
    async with (
        start_service(triton, write_grace_seconds=0.2) as service,
        grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}", options=SMALL_WINDOW) as channel,
    ):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            ask(logprobs=20), metadata=(("x-tidegate-timeout-ms", "1500"),)
        )
        await call.read()
        async with asyncio.timeout(1.4):
            while service.slots.ledger.running_count:
                await asyncio.sleep(0.01)
        outcome = 'tidegate_requests_total{outcome="deadline_exceeded",reason="DEADLINE_EXCEEDED"} 1.0'
        assert "tidegate_requests_total{" not in generate_latest(service.registry).decode()
        async with asyncio.timeout(3):
            while outcome not in generate_latest(service.registry).decode():
                await asyncio.sleep(0.02)
        call.cancel()


async def test_a_client_that_leaves_the_queue_gives_its_place_up(start_service, fake_triton, channel_to):
    triton = fake_triton("x" * 1000, pace=0.01, slots=1)
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        first = stub.Generate(ask())
        await first.read()
        waiting = stub.Generate(ask())
        waiting_read = asyncio.create_task(waiting.read())
        async with asyncio.timeout(1):
            while not service.slots.ledger.waiting_count:
                await asyncio.sleep(0.005)
            waiting.cancel()
            while service.slots.ledger.waiting_count:
                await asyncio.sleep(0.005)
        await asyncio.gather(waiting_read, return_exceptions=True)
        first.cancel()


async def test_requests_that_wait_are_refused_at_once_when_the_engine_goes_away(start_service, fake_triton, channel_to):
    triton = fake_triton("x" * 1000, pace=0.01, slots=1)
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        first = stub.Generate(ask())
        await first.read()
        waiting = asyncio.create_task(collect(stub, ask()))
        async with asyncio.timeout(1):
            while not service.slots.ledger.waiting_count:
                await asyncio.sleep(0.005)
            triton.set_ready(False)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await waiting
        assert reason_of(caught.value) == "REPLICA_UNAVAILABLE"
        first.cancel()
