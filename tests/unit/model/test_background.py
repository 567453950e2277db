"""What happens beside the streams: answers to the cache, loads to Envoy, metrics and averages."""

from __future__ import annotations

import asyncio
import json
import random

import grpc
import pytest
from prometheus_client import generate_latest
from xds.data.orca.v3 import orca_load_report_pb2
from xds.service.orca.v3 import orca_pb2

from tidegate.model import orca
from tidegate.model.call import CallHeaders, read_headers, time_allowed_seconds
from tidegate.model.credits import CreditLedger, Terms
from tidegate.model.load import ReplicaLoad
from tidegate.model.moving_averages import MovingAverage, MovingRate
from tidegate.model.peers import Peers
from tidegate.model.records import AnswerCollector, AnswerRecorder
from tidegate.model.slots import Slots
from tidegate.model.tokens import Buffer
from tidegate.v1 import cache_pb2, cache_pb2_grpc, inference_pb2, inference_pb2_grpc

KEY = bytes(range(32))


class FakeCache(cache_pb2_grpc.CacheServicer):
    def __init__(self) -> None:
        self.records: list[cache_pb2.RecordRequest] = []

    async def Record(self, request, context):
        self.records.append(request)
        return cache_pb2.RecordResponse(stored=True)


@pytest.fixture
async def cache():
    server = grpc.aio.server()
    fake = FakeCache()
    cache_pb2_grpc.add_CacheServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield fake
    await server.stop(None)


async def generate(stub, metadata=(), **fields):
    return [event async for event in stub.Generate(inference_pb2.GenerateRequest(**fields), metadata=metadata)]


async def wait_for(condition, seconds: float = 2.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_complete_answer_with_a_key_is_recorded_as_it_was_sent(start_service, fake_triton, channel_to, cache):
    async with start_service(fake_triton("Grüße"), mesh_address=cache.address) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        metadata = (("x-tidegate-answer-key", KEY.hex()), ("x-tidegate-tenant", "t1"))
        events = await generate(stub, metadata, text="hello")
        await wait_for(lambda: cache.records)
    (record,) = cache.records
    assert (record.answer_key, record.tenant, record.answer.model) == (KEY, "t1", "bytes")
    assert "".join(delta.text for delta in record.answer.deltas) == "Grüße"
    assert [token for delta in record.answer.deltas for token in delta.token_ids] == list("Grüße".encode())
    assert record.answer.finished == events[-1].finished


async def test_without_a_key_or_in_error_or_resumed_or_shortened_nothing_is_recorded(
    start_service, fake_triton, channel_to, cache
):
    async with start_service(fake_triton("abc" * 30, pace=0.01), mesh_address=cache.address) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        key = ("x-tidegate-answer-key", KEY.hex())
        await generate(stub, (), text="hello", max_tokens=2)
        await generate(stub, (key, ("x-tidegate-timeout-ms", "60")), text="hello")
        await generate(stub, (key,), text="hello", max_tokens=4, resume={"token_ids": [97]})
        await generate(stub, (key, ("x-tidegate-max-tokens", "2")), text="hello", max_tokens=4)
        await asyncio.sleep(0.05)
    assert cache.records == []


async def test_a_cache_that_is_away_costs_nothing_but_a_count():
    dropped: list[str] = []
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    recorder = AnswerRecorder(channel, queue_limit=1, timeout_seconds=0.5, on_drop=dropped.append)
    recorder.put(cache_pb2.RecordRequest())
    recorder.put(cache_pb2.RecordRequest())
    assert dropped == ["full"]
    running = asyncio.create_task(recorder.run())
    await wait_for(lambda: dropped == ["full", "failed"])
    running.cancel()
    await channel.close()


def test_a_collector_gives_nothing_for_an_answer_that_ended_in_an_error():
    collector = AnswerCollector(KEY, "t")
    finished = inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_ERROR)
    assert collector.add(inference_pb2.GenerateEvent(finished=finished)) is None


async def test_orca_says_requests_over_slots(start_service, fake_triton, channel_to):
    triton = fake_triton("x" * 200, pace=0.02, slots=4)
    async with start_service(triton) as service:
        channel = channel_to(service)
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(text="hello"))
        await call.read()
        stream = channel.unary_stream(
            f"/{orca.SERVICE_NAME}/StreamCoreMetrics",
            request_serializer=orca_pb2.OrcaLoadReportRequest.SerializeToString,
            response_deserializer=orca_load_report_pb2.OrcaLoadReport.FromString,
        )(orca_pb2.OrcaLoadReportRequest())
        report = await stream.read()
        assert report.application_utilization == 0.25
        assert report.named_metrics["kv_cache_usage"] == pytest.approx(28 / 128)
        stream.cancel()
        call.cancel()


@pytest.mark.parametrize(("asked_ms", "seconds"), [(0, 1.0), (10, 0.1), (5_000, 5.0), (3_600_000, 60.0)])
def test_orca_reports_as_often_as_asked_within_bounds(asked_ms, seconds):
    request = orca_pb2.OrcaLoadReportRequest()
    request.report_interval.FromMilliseconds(asked_ms)
    assert orca.interval_seconds(request) == seconds


async def test_metrics_have_the_public_names(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc")) as service:
        await generate(inference_pb2_grpc.InferenceStub(channel_to(service)), text="hello")
        page = generate_latest(service.registry).decode()
    for line in (
        'vllm:generation_tokens_total{engine="0",model_name="bytes"} 4.0',
        'vllm:prompt_tokens_total{engine="0",model_name="bytes"} 5.0',
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="bytes"} 1.0',
        'vllm:prefix_cache_queries_total{engine="0",model_name="bytes"} 0.0',
        'vllm:prefix_cache_hits_total{engine="0",model_name="bytes"} 0.0',
        'vllm:inter_token_latency_seconds_count{engine="0",model_name="bytes"} 3.0',
        'vllm:time_to_first_token_seconds_count{engine="0",model_name="bytes"} 1.0',
        'tidegate_requests_total{outcome="completed",reason=""} 1.0',
        "tidegate_fail_open_requests_total 1.0",
        "tidegate_slots 4.0",
    ):
        assert line in page
    assert 'gen_ai_server_request_duration_seconds_count{error_type=""' in page
    assert 'vllm:cache_config_info{block_size="16",engine="0",model_name="bytes",num_gpu_blocks="128"} 1.0' in page


def test_an_average_forgets_with_its_half_life():
    average = MovingAverage(2.0)
    assert average.value(0.0) is None
    average.add(10.0, 1, now=0.0)
    average.add(0.0, 1, now=2.0)
    assert average.value(2.0) == pytest.approx(10 / 3)


def test_an_average_falls_while_nothing_comes():
    average = MovingAverage(2.0)
    average.add(10.0, 1, now=0.0)
    assert average.value(4.0) == pytest.approx(2.5)


def test_a_rate_settles_at_the_events_a_second_and_falls_when_they_stop():
    rate = MovingRate(2.0, now=0.0)
    for tick in range(4000):
        rate.add(1, now=tick / 100)
    assert rate.per_second(40.0) == pytest.approx(100, rel=0.02)
    assert rate.per_second(42.0) == pytest.approx(50, rel=0.02)


async def test_the_retry_time_follows_how_long_slots_are_held(monkeypatch):
    dice = random.Random(1)
    monkeypatch.setattr("tidegate.model.load.random", dice)
    now = [0.0]
    load = ReplicaLoad("a:1", "m", 2048, lambda: None, clock=lambda: now[0])
    terms = Terms(lease_seconds=5.0, grace_seconds=1.0, protected_seconds=0.25, queue_limit=8, overflow_slot_count=0)
    load.slots = slots = Slots(CreditLedger(terms, "life"), load.retry_after_seconds, lambda: now[0])
    slots.set_capacity(2, can_start=True)
    times = [load.retry_after_seconds() for _ in range(20)]
    assert 1.0 < min(times) < 1.1 < 1.4 < max(times) < 1.5
    for _ in range(10):
        slot = await slots.take(credit_id="", resumed=False)
        now[0] += 20
        slot.release()
    assert load.retry_after_seconds() == pytest.approx(12.5, abs=2.5)
    for _ in range(10):
        slot = await slots.take(credit_id="", resumed=False)
        now[0] += 2_000
        slot.release()
    assert load.retry_after_seconds() == 60.0


def test_the_buffer_gives_everything_once_and_in_order():
    dice = random.Random(1)
    buffer, texts, tokens, got_text, got_tokens = Buffer(8), "", [], "", []
    for number in range(500):
        if dice.random() < 0.6:
            piece = chr(97 + number % 26) * dice.randrange(3)
            buffer.add(piece, [number], ())
            texts, tokens = texts + piece, [*tokens, number]
        elif not buffer.is_empty:
            delta = inference_pb2.Delta()
            buffer.move_to(delta)
            got_text, got_tokens = got_text + delta.text, got_tokens + list(delta.token_ids)
    rest = inference_pb2.Delta()
    buffer.move_to(rest)
    assert (got_text + rest.text, got_tokens + list(rest.token_ids)) == (texts, tokens)
    assert buffer.is_empty


def test_the_buffer_is_full_at_its_bound():
    buffer = Buffer(2)
    buffer.add("a", [1], ())
    assert not buffer.is_full
    buffer.add("b", [2], ())
    assert buffer.is_full


def test_headers_that_make_no_sense_are_as_if_absent():
    call = read_headers(
        [
            ("x-tidegate-timeout-ms", "soon"),
            ("x-tidegate-answer-key", "xyz"),
            ("x-tidegate-queue-ms", "nan"),
            ("x-tidegate-tensor-bin", b"\x00"),
        ]
    )
    assert call == CallHeaders()


def allowed(call: CallHeaders, grpc_remaining_seconds: float | None, late_seconds: float = 0.0) -> float:
    return time_allowed_seconds(
        call, grpc_remaining_seconds, late_seconds=late_seconds, default_seconds=600.0, longest_seconds=7200.0
    )


def test_the_deadline_is_the_least_of_those_given_and_keeps_a_margin_of_grpcs():
    assert allowed(CallHeaders(timeout_seconds=2.0), 30.0) == 2.0
    assert allowed(CallHeaders(), 10.0) == pytest.approx(9.98)
    assert allowed(CallHeaders(), 0.1) == pytest.approx(0.095)
    assert allowed(CallHeaders(), -1.0) == 0.0


def test_what_the_header_gives_is_less_by_the_way_to_here():
    assert allowed(CallHeaders(timeout_seconds=2.0), None, late_seconds=0.5) == 1.5
    assert allowed(CallHeaders(timeout_seconds=2.0), 1.0, late_seconds=0.5) == pytest.approx(0.98)
    assert allowed(CallHeaders(timeout_seconds=2.0), None, late_seconds=3.0) == 0.0
    assert allowed(CallHeaders(), None, late_seconds=3.0) == 600.0


def test_the_default_deadline_is_for_a_call_that_has_none_and_bounds_no_other():
    assert allowed(CallHeaders(), None) == 600.0
    assert allowed(CallHeaders(timeout_seconds=1800.0), None) == 1800.0
    assert allowed(CallHeaders(), 1800.0) == pytest.approx(1799.98)


def test_no_deadline_is_above_the_longest():
    assert allowed(CallHeaders(timeout_seconds=9000.0), None) == 7200.0
    assert allowed(CallHeaders(), 9000.0) == 7200.0


def test_peers_are_the_other_endpoints_of_the_file(tmp_path):
    path = tmp_path / "model.yaml"
    entries = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in (1, 2)
    ]
    path.write_text(json.dumps({"resources": [{"endpoints": [{"lb_endpoints": entries}]}]}))
    channel = object.__new__(_NoChannel)
    assert Peers(channel, str(path), "127.0.0.1:1").addresses() == ["127.0.0.1:2"]
    path.write_text("resources: [1]")
    assert Peers(channel, str(path), "127.0.0.1:1").addresses() == []
    assert Peers(channel, str(tmp_path / "none"), "").addresses() == []
    assert Peers(channel, "", "").addresses() == []


class _NoChannel:
    """Takes the calls of a generated stub's constructor and makes none of them."""

    def unary_stream(self, *arguments, **options):
        return None

    unary_unary = stream_stream = unary_stream
