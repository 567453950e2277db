from __future__ import annotations

import asyncio
import base64
import gc
import json
import struct
import time
import uuid

import grpc
import msgspec
import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.api import httpbody_pb2
from google.rpc import error_details_pb2, status_pb2

from tidegate.common import headers
from tidegate.common.arena import decode_tensor_header
from tidegate.common.errors import SURFACES, Reason, TidegateError
from tidegate.scheduler import servicer
from tidegate.scheduler.servicer import LEFT_LOOKS, UNWATCHED_SECONDS, ExternalProcessor
from tidegate.v1 import errors_pb2, inference_pb2, preprocess_pb2, scheduler_pb2, tensor_pb2

GRPC = {":path": "/tidegate.v1.Inference/Generate", "content-type": "application/grpc"}


async def test_a_request_is_dispatched_with_everything_that_the_replica_needs(world):
    tokens = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_INT32, shape=[7], inline_bytes=b"x" * 28)
    world.preprocess.answer = lambda request: world.prepared(
        request, tokens=tokens, answer_key=b"k" * 32, service_class=inference_pb2.SERVICE_CLASS_BATCH
    )
    world.replica.grant("credit-1")
    await world.credits(1)
    exchange = world.exchange()
    fields = world.decided(await exchange.run())
    assert fields[headers.REPLICA] == world.replica.address
    assert fields[headers.CREDIT] == "credit-1"
    assert float(fields[headers.SENT]) == pytest.approx(time.time(), abs=5)
    assert fields[headers.SERVICE_CLASS] == "batch"
    assert fields[headers.ANSWER_KEY] == (b"k" * 32).hex()
    assert decode_tensor_header(fields[headers.TENSOR]) == tokens
    assert headers.TIMEOUT_MS not in fields
    assert float(fields[headers.QUEUE_MS]) < 1000
    assert await exchange.receive() is None


async def test_a_replica_is_told_of_a_deadline_that_the_client_gave(world):
    world.replica.grant("credit-1")
    fields = world.decided(await world.exchange().run({"grpc-timeout": "10S"}))
    assert 9_000 < int(fields[headers.TIMEOUT_MS]) < 10_000


async def test_a_class_bounds_the_wait_in_the_queue(start_world):
    world = await start_world(standard_deadline_seconds=0.2)
    status, _, body = world.refused(await world.exchange().run())
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


async def test_a_body_that_does_not_come_is_not_waited_for_for_ever(start_world):
    world = await start_world(body_wait_seconds=0.1)
    exchange = world.exchange()
    await exchange.send_headers()
    assert (await exchange.receive()).WhichOneof("response") == "request_headers"
    status, _, body = world.refused(await exchange.receive())
    assert (status, body["error"]["code"]) == (400, "invalid_http")
    assert body["error"]["message"] == "The body did not arrive within 0.1 s"
    assert await exchange.receive() is None


@pytest.mark.parametrize("is_grpc", [False, True])
async def test_nothing_of_a_body_is_kept_here_while_its_request_waits(world, is_grpc):
    marker = str(uuid.uuid4()).encode()
    if is_grpc:
        data = httpbody_pb2.HttpBody(data=marker * 50).SerializeToString()
        fields = {**GRPC, ":path": "/tidegate.v1.Inference/ChatCompletions"}
        await world.exchange().begin(fields, struct.pack(">BI", 0, len(data)) + data)
        del data
    else:
        await world.exchange().begin(body=marker * 50)
    await world.replica.demand(1)
    # The stand-in for preprocess forgets it, too, when the next prompt comes.
    world.preprocess.requests.clear()
    await world.exchange().begin()
    await world.replica.demand(2)
    kept = [
        type(owner)
        for owner in gc.get_objects()
        for value in gc.get_referents(owner)
        if value is not marker and _holds(value, marker)
    ]
    assert kept == []


def _holds(value, marker):
    if isinstance(value, ext_proc.ProcessingRequest | preprocess_pb2.PrepareRequest | httpbody_pb2.HttpBody):
        value = value.SerializeToString()
    return isinstance(value, bytes) and marker in value


async def test_preprocess_gets_the_body_and_the_tenant(world):
    world.replica.grant("c")
    await world.exchange().run()
    (request,) = world.preprocess.requests
    assert request.body_kind == preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS
    assert request.tenant == "acme"
    assert request.body.startswith(b'{"model"')


async def test_envoy_is_asked_to_wait_as_long_as_the_deadline_where_a_decision_takes_a_while(world):
    exchange = world.exchange()
    await exchange.begin({"grpc-timeout": "10S"})
    assert 10 < await exchange.is_asked_to_wait() < 12
    exchange = world.exchange()
    await exchange.begin()
    assert 600 < await exchange.is_asked_to_wait() < 602


async def test_envoy_is_not_asked_to_wait_for_a_decision_that_comes_at_once(world):
    world.replica.grant("c")
    await world.credits(1)
    exchange = world.exchange()
    await exchange.send_headers()
    assert (await exchange.receive()).HasField("request_headers")
    await exchange.send_body()
    assert headers.CREDIT in world.decided(await exchange.receive())
    assert exchange.hold_seconds == 0


async def test_a_decision_comes_after_the_wish_to_wait_for_it(world):
    exchange = world.exchange()
    await exchange.begin()
    await exchange.is_asked_to_wait()
    world.replica.grant("c")
    assert headers.CREDIT in world.decided(await exchange.receive())


async def test_a_request_waits_for_a_credit_and_its_status_can_be_asked(world):
    exchange = world.exchange()
    await exchange.begin()
    await world.replica.demand(1)
    status = await world.scheduler.GetQueueStatus(scheduler_pb2.GetQueueStatusRequest(request_id="request-1"))
    assert (status.position, status.request_id, status.HasField("expected_wait")) == (1, "request-1", False)
    world.replica.grant("c")
    assert world.decided(await exchange.receive())[headers.CREDIT] == "c"


async def test_a_stream_that_is_reset_while_it_waits_frees_its_place(world):
    exchange = world.exchange()
    await exchange.begin()
    await world.replica.demand(1)
    exchange.call.cancel()
    await world.replica.demand(0)
    assert (await world.snapshot()).totals.abandoned == 1


async def test_a_stream_that_envoy_merely_ends_while_it_waits_frees_its_place(world):
    exchange = world.exchange()
    await exchange.begin()
    await world.replica.demand(1)
    await exchange.call.done_writing()
    await world.replica.demand(0)
    await world.until(lambda snapshot: snapshot.totals.abandoned == 1)


class HeldStream:
    """A stream as gRPC shows it to its reader: headers, body, and the end once the client has left."""

    def __init__(self):
        fields = {":method": "POST", ":path": "/v1/chat/completions"}
        values = [base_pb2.HeaderValue(key=key, raw_value=value.encode()) for key, value in fields.items()]
        received = ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=values))
        body = ext_proc.HttpBody(body=b"{}", end_of_stream=True)
        self._messages = [
            ext_proc.ProcessingRequest(request_headers=received),
            ext_proc.ProcessingRequest(request_body=body),
        ]
        self.has_left = asyncio.Event()

    async def read(self):
        if self._messages:
            return self._messages.pop(0)
        await self.has_left.wait()
        return grpc.aio.EOF

    async def write(self, message):
        pass


@pytest.fixture
async def held(world):
    """A stream whose request waits, and the task that serves it: with the end of the task gRPC sends a status."""
    service, stream = world.service, HeldStream()
    processor = ExternalProcessor(service.pipeline, service.outcomes, time.monotonic)
    task = asyncio.create_task(processor.Process(None, stream))
    await world.replica.demand(1)
    await asyncio.sleep(2 * UNWATCHED_SECONDS)
    yield stream, task
    task.cancel()


async def test_no_status_is_sent_before_grpc_has_seen_a_reset(world, held):
    stream, task = held
    stream.has_left.set()
    await world.replica.demand(0)
    await asyncio.wait({task}, timeout=0.1)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task}, timeout=0.1)
    assert task.cancelled()
    assert (await world.snapshot()).totals.abandoned == 1


async def test_no_status_is_sent_when_grpc_sees_a_reset_together_with_its_reader(world, held):
    stream, task = held
    stream.has_left.set()
    await asyncio.sleep(0)  # Now the reader has asked for the task's end.
    task.cancel()
    await asyncio.wait({task}, timeout=0.1)
    assert task.cancelled()
    assert (await world.snapshot()).totals.abandoned == 1


async def test_a_stream_that_has_merely_ended_gets_its_status_at_last(world, held, monkeypatch):
    monkeypatch.setattr(servicer, "LEFT_SECONDS", 0.02)
    stream, task = held
    stream.has_left.set()
    await asyncio.wait({task}, timeout=0.01 * LEFT_LOOKS)
    assert not task.done()
    await asyncio.wait({task}, timeout=5)
    assert (task.done(), task.cancelled(), task.exception()) == (True, False, None)


async def test_a_refusal_of_preprocess_reaches_an_http_client_as_an_openai_error(world):
    def refuse(request):
        response = preprocess_pb2.PrepareResponse(request_id=request.request_id)
        response.error.reason, response.error.message = "INVALID_VALUE", "temperature must be at most 2"
        response.error.field = "temperature"
        return response

    world.preprocess.answer = refuse
    status, fields, body = world.refused(await world.exchange().run())
    assert status == 400
    assert fields["content-type"] == "application/json"
    assert fields[headers.REASON] == "INVALID_VALUE"
    assert fields["x-should-retry"] == "false"
    assert body == {
        "error": {
            "message": "temperature must be at most 2",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }


async def test_a_refusal_over_grpc_carries_its_details(start_world):
    world = await start_world(batch_request_limit=1)
    await world.exchange().begin({**GRPC, headers.SERVICE_CLASS: "batch"}, struct.pack(">BI", 0, 0))
    await world.replica.demand(1)
    exchange = world.exchange()
    await exchange.send_headers({**GRPC, headers.SERVICE_CLASS: "batch"})
    immediate = (await exchange.receive()).immediate_response
    fields = {item.header.key: item.header.raw_value.decode() for item in immediate.headers.set_headers}
    assert immediate.grpc_status.status == 14
    assert immediate.body == b""
    assert fields["grpc-status"] == "14"
    assert fields["grpc-message"] == "The batch queue is full by requests; 1 requests wait in it"
    assert immediate.details == "tidegate_server_is_overloaded"
    assert int(fields["grpc-retry-pushback-ms"]) >= 5000
    assert "content-type" not in fields
    details = fields["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("SERVER_IS_OVERLOADED", "tidegate")
    assert await exchange.receive() is None


async def test_a_class_in_the_headers_wins_over_that_of_the_body(world):
    world.replica.grant("c")
    fields = world.decided(await world.exchange().run({headers.SERVICE_CLASS: "realtime"}))
    assert fields[headers.SERVICE_CLASS] == "realtime"


async def test_a_deadline_that_passes_in_the_queue_is_a_504(world):
    status, fields, body = world.refused(await world.exchange().run({"grpc-timeout": "200m"}))
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    assert fields["x-should-retry"] == "false"


async def test_a_known_answer_goes_to_the_cache_without_a_credit(world):
    world.preprocess.answer = lambda request: world.prepared(request, answer_key=b"k" * 32)
    world.cache.known.add(b"k" * 32)
    response = await world.exchange().run()
    fields = world.decided(response)
    assert fields[headers.ROUTE] == "cache"
    assert fields[headers.ANSWER_KEY] == (b"k" * 32).hex()
    assert headers.CREDIT not in fields
    assert response.request_body.response.clear_route_cache
    (lookup,) = world.cache.lookups
    assert (lookup.answer_key, lookup.tenant) == (b"k" * 32, "acme")


async def test_an_answer_that_is_not_deterministic_is_not_looked_up(world):
    world.replica.grant("c")
    await world.exchange().run()
    assert world.cache.lookups == []


async def test_a_slow_cache_is_a_miss_and_is_left_out_after_some(start_world):
    world = await start_world(cache_timeout_seconds=0.02, dependency_failure_limit=2, dependency_pause_seconds=60)
    world.preprocess.answer = lambda request: world.prepared(request, answer_key=b"k" * 32)
    world.cache.known.add(b"k" * 32)
    world.cache.delay_seconds = 1
    world.replica.grant("1", "2", "3")
    for _ in range(3):
        assert headers.CREDIT in world.decided(await world.exchange().run())
    assert len(world.cache.lookups) == 2
    dependency = (await world.snapshot()).dependencies[1]
    assert (dependency.name, dependency.reachable) == ("cache", False)


async def test_without_preprocess_requests_go_on_with_an_estimate(start_world):
    world = await start_world(with_services=False)
    exchange = world.exchange()
    await exchange.begin(body=b"x" * 400)
    await world.replica.demand(1)
    assert (await world.snapshot()).lanes[1].waiting_token_count == 100 + 256
    world.replica.grant("c")
    fields = world.decided(await exchange.receive())
    assert (headers.TENSOR in fields, fields[headers.CREDIT]) == (False, "c")


async def test_a_preprocess_that_does_not_answer_costs_its_time_and_no_more(world):
    world.preprocess.answer = lambda request: None
    world.replica.grant("c")
    began = asyncio.get_running_loop().time()
    await world.exchange().run()
    assert 0.1 < asyncio.get_running_loop().time() - began < 1


async def test_a_request_that_would_wait_anyway_waits_for_its_tokens(world):
    released = []
    world.preprocess.answer = released.append
    exchange = world.exchange()
    await exchange.begin()
    await asyncio.sleep(0.4)
    assert (await world.snapshot()).lanes[1].waiting_request_count == 0
    await world.preprocess.say(world.prepared(released[0], tokens=tensor_pb2.Tensor(data_type=1)))
    await world.replica.demand(1)
    world.replica.grant("c")
    assert headers.TENSOR in world.decided(await exchange.receive())


async def test_patience_with_preprocess_ends_with_the_clients_deadline(world):
    world.preprocess.answer = lambda request: None
    exchange = world.exchange()
    await exchange.begin({"grpc-timeout": "400m"})
    async with asyncio.timeout(await exchange.is_asked_to_wait()):
        status, _, body = world.refused(await exchange.receive())
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("reason", ["INTERNAL_ERROR", "SERVER_IS_OVERLOADED"])
async def test_a_prompt_at_which_preprocess_fails_is_left_to_the_model_service(start_world, monkeypatch, reason):
    busy = Reason.SERVER_IS_OVERLOADED
    monkeypatch.setitem(SURFACES, busy, msgspec.structs.replace(SURFACES[busy], http_status=429))
    world = await start_world(dependency_failure_limit=2, dependency_pause_seconds=60)

    def fail(request):
        error = errors_pb2.Refusal(reason=reason, message="the prompt could not be prepared")
        return preprocess_pb2.PrepareResponse(request_id=request.request_id, error=error)

    world.preprocess.answer = fail
    world.replica.grant("1", "2", "3")
    for _ in range(3):
        assert headers.CREDIT in world.decided(await world.exchange().run())
    assert len(world.preprocess.requests) == 2
    dependency = (await world.snapshot()).dependencies[0]
    assert (dependency.name, dependency.reachable) == ("preprocess", False)


def _with_lease(world, lease_id, **fields):
    """A preprocess answer whose tokens lie under this lease."""
    handle = tensor_pb2.SharedMemoryHandle(host_id="h", region="r", byte_offset=64, byte_count=28, lease_id=lease_id)
    tokens = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_INT32, shape=[7], shared_memory=handle)
    return lambda request: world.prepared(request, tokens=tokens, **fields)


async def test_the_tokens_of_a_dispatched_request_are_not_given_back(world):
    world.replica.grant("c")
    world.preprocess.answer = _with_lease(world, 1)
    await world.exchange().run()
    world.preprocess.answer = _with_lease(world, 2)
    await world.exchange().run({"grpc-timeout": "200m"})
    await world.preprocess.released(2)


async def test_tokens_of_requests_that_are_refused_are_given_back(start_world):
    world = await start_world(standard_request_limit=1)
    world.preprocess.answer = _with_lease(world, 1)
    await world.exchange().begin()
    await world.replica.demand(1)
    world.preprocess.answer = _with_lease(world, 2)
    assert world.refused(await world.exchange().run())[0] == 503
    await world.preprocess.released(2)


async def test_tokens_of_requests_that_leave_the_queue_are_given_back(world):
    exchanges = []
    for lease_id in range(1, 4):
        world.preprocess.answer = _with_lease(world, lease_id)
        exchanges.append(world.exchange())
        await exchanges[-1].begin()
        await world.replica.demand(lease_id)
    for exchange in exchanges[1:]:
        exchange.call.cancel()
    await world.preprocess.released(2, 3)


async def test_tokens_of_a_replayed_answer_are_given_back(world):
    world.cache.known.add(b"k" * 32)
    world.preprocess.answer = _with_lease(world, 1, answer_key=b"k" * 32)
    fields = world.decided(await world.exchange().run())
    assert (fields[headers.ROUTE], headers.TENSOR in fields) == ("cache", False)
    await world.preprocess.released(1)


async def test_tokens_of_a_decision_that_does_not_reach_envoy_are_given_back(world):
    world.preprocess.answer = _with_lease(world, 1)
    place = world.service.pipeline.place
    exchange = world.exchange()

    async def place_and_lose(request):
        decision = await place(request)
        exchange.call.cancel()
        await asyncio.sleep(0.2)
        return decision

    world.service.pipeline.place = place_and_lose
    await exchange.begin()
    await world.replica.demand(1)
    world.replica.grant("c")
    await world.preprocess.released(1)


async def test_a_refusal_counts_as_one_when_the_stream_ends_with_it(world):
    exchange = world.exchange()

    async def refuse_as_the_stream_ends(request):
        exchange.call.cancel()
        raise TidegateError(Reason.SERVER_IS_OVERLOADED, "The queue is full.")

    world.service.pipeline.place = refuse_as_the_stream_ends
    await exchange.begin()
    await world.until(lambda snapshot: snapshot.totals.refused["SERVER_IS_OVERLOADED"] == 1)
    totals = (await world.snapshot()).totals
    assert (totals.abandoned, totals.refused_unread) == (0, 0)


async def test_tokens_that_come_too_late_are_given_back(world):
    late = []
    world.preprocess.answer = late.append
    world.replica.grant("c")
    await world.credits(1)
    assert headers.TENSOR not in world.decided(await world.exchange().run())
    await world.preprocess.say(_with_lease(world, 1)(late[0]))
    await world.preprocess.released(1)


async def test_patience_with_preprocess_ends(start_world):
    world = await start_world(prepare_timeout_seconds=0.05, prepare_patience_seconds=0.2)
    world.preprocess.answer = lambda request: None
    began = asyncio.get_running_loop().time()
    await world.exchange().begin()
    await world.replica.demand(1)
    assert 0.2 <= asyncio.get_running_loop().time() - began < 2


async def test_all_who_wait_for_preprocess_go_on_when_its_stream_breaks_and_it_is_opened_again(start_world):
    world = await start_world(prepare_timeout_seconds=30, prepare_patience_seconds=30)
    world.preprocess.answer = lambda request: None
    world.replica.grant("1", "2", "3")
    exchanges = [world.exchange() for _ in range(2)]
    for exchange in exchanges:
        await exchange.begin()
    async with asyncio.timeout(5):
        while len(world.preprocess.requests) < 2:
            await asyncio.sleep(0.01)
    world.preprocess.break_off.set()
    for exchange in exchanges:
        assert headers.TENSOR not in world.decided(await exchange.receive())
    world.preprocess.answer = lambda request: world.prepared(request, tokens=tensor_pb2.Tensor(data_type=1))
    await world.until(lambda snapshot: snapshot.dependencies[0].reachable)
    assert headers.TENSOR in world.decided(await world.exchange().run())
    assert world.preprocess.streams == 2


async def test_a_request_that_names_its_replica_passes_without_its_body(world):
    exchange = world.exchange()
    await exchange.send_headers({headers.REPLICA: "127.0.0.1:1"})
    assert (await exchange.receive()).WhichOneof("response") == "request_headers"
    assert await exchange.receive() is None
    assert (await world.snapshot()).totals.received == 0


@pytest.mark.parametrize("fields", [{":path": "/v1/models"}, {"content-encoding": "gzip"}])
async def test_what_is_not_the_schedulers_passes(world, fields):
    exchange = world.exchange()
    await exchange.send_headers(fields)
    assert (await exchange.receive()).WhichOneof("response") == "request_headers"
    assert await exchange.receive() is None


async def test_a_compressed_grpc_message_passes_without_a_placement(world):
    exchange = world.exchange()
    response = await exchange.run(GRPC, struct.pack(">BI", 1, 3) + b"abc")
    assert (response.WhichOneof("response"), world.decided(response)) == ("request_body", {})
    assert (await world.snapshot()).totals.passed_through == 1


async def test_a_request_without_a_body_is_decided_in_its_headers(world):
    world.replica.grant("c")
    exchange = world.exchange()
    await exchange.send_headers(end_of_stream=True)
    response = await exchange.receive()
    assert response.WhichOneof("response") == "request_headers"
    assert world.decided(response)[headers.CREDIT] == "c"
    assert world.preprocess.requests[0].body == b""


async def test_with_no_replica_for_long_requests_are_refused(start_world):
    world = await start_world(replica_grace_seconds=1.0, replica_absence_limit_seconds=2.0, tick_seconds=0.05)
    world.replica.say_load(ready=False, not_ready_reason="loading")
    await world.until(lambda snapshot: not snapshot.replicas[0].load.ready)
    waiting = world.exchange()
    await waiting.begin()
    await world.replica.demand(1)
    await asyncio.sleep(1.1)
    refused = world.exchange()
    await refused.send_headers()
    status, fields, body = world.refused(await refused.receive())
    assert (status, body["error"]["code"]) == (503, "replica_unavailable")
    assert int(fields["retry-after"]) >= 5
    status, _, body = world.refused(await waiting.receive())
    assert (status, body["error"]["code"]) == (503, "replica_unavailable")


async def test_a_fault_of_our_own_lets_the_request_go_on_unplaced(world):
    world.service.pipeline._set_deadline = lambda request: 1 / 0
    exchange = world.exchange()
    await exchange.begin()
    assert await exchange.receive() is None
    totals = (await world.snapshot()).totals
    assert (totals.received, totals.passed_through) == (1, 1)


async def test_every_request_ends_in_one_outcome(world):
    world.replica.grant("c")
    await world.exchange().run()
    await world.exchange().run({"grpc-timeout": "50m"})
    totals = (await world.snapshot()).totals
    assert (totals.received, totals.dispatched, dict(totals.refused)) == (2, 1, {"DEADLINE_EXCEEDED": 1})
    assert world.service.outcomes.held_request_count == 0


def _arrived(seconds_ago, header=headers.ARRIVED):
    return {header: f"{time.time() - seconds_ago:.6f}"}


async def test_a_deadline_counts_from_the_arrival_at_the_ingress(world):
    exchange = world.exchange()
    await exchange.begin({"grpc-timeout": "10S", **_arrived(3)})
    assert 7 < await exchange.is_asked_to_wait() < 9


async def test_what_is_looked_at_too_late_is_refused_from_its_headers(world):
    exchange = world.exchange()
    await exchange.send_headers(_arrived(6))
    status, fields, body = world.refused(await exchange.receive())
    assert (status, body["error"]["code"]) == (503, "server_is_overloaded")
    assert 2 <= int(fields["retry-after"]) <= 8
    totals = (await world.snapshot()).totals
    assert (totals.refused["SERVER_IS_OVERLOADED"], totals.refused_unread) == (1, 1)


async def test_who_sends_slowly_is_not_looked_at_late(world):
    world.replica.grant("c")
    fields = {**_arrived(6), **_arrived(0, headers.WHOLE)}
    assert headers.CREDIT in world.decided(await world.exchange().run(fields))
    exchange = world.exchange()
    await exchange.begin({"grpc-timeout": "10S", **_arrived(3), **_arrived(0, headers.WHOLE)})
    assert 7 < await exchange.is_asked_to_wait() < 9


@pytest.mark.parametrize("arrived", ["", "soon", "1.5", "99999999999", "nan"])
async def test_a_time_of_arrival_that_makes_no_sense_is_left_aside(world, arrived):
    world.replica.grant("c")
    assert headers.CREDIT in world.decided(await world.exchange().run({headers.ARRIVED: arrived}))


async def test_a_class_that_does_not_exist_is_refused_by_name(world):
    exchange = world.exchange()
    await exchange.send_headers({headers.SERVICE_CLASS: "urgent"})
    status, _, body = world.refused(await exchange.receive())
    assert (status, body["error"]["param"]) == (400, "x-service-class")
    assert "'urgent', expected one of realtime, standard, batch" in body["error"]["message"]


async def test_envoy_is_told_what_to_refuse_when_all_come_late_and_that_it_is_over(start_world, tmp_path):
    file = tmp_path / "shed.yaml"
    world = await start_world(shed_file=str(file), shed_interval_seconds=0.05, shed_late_seconds=0.1, start_share=1.0)
    assert _refused_of(file, "standard") == 0
    world.replica.grant(*map(str, range(1000)))

    async def until_refused(is_so, arrived_ago, pause):
        async with asyncio.timeout(10):
            while not is_so(_refused_of(file, "standard")):
                await world.exchange().run(_arrived(arrived_ago))
                await asyncio.sleep(pause)

    await until_refused(lambda parts: parts > 0, 0.5, 0)
    # Few, and at once: a load that has ended.
    await until_refused(lambda parts: parts == 0, 0, 0.05)


async def test_envoy_is_told_when_what_it_refuses_may_come_back_by_what_waits(start_world, tmp_path):
    file = tmp_path / "shed.yaml"
    # Without a known rate at which requests leave, it is the time by default.
    world = await start_world(
        shed_file=str(file),
        shed_interval_seconds=0.05,
        shed_late_seconds=0.1,
        start_share=1.0,
        default_retry_seconds=5.0,
    )
    assert _shortest_retry_of(file) == 1
    world.replica.grant(*map(str, range(1000)))
    async with asyncio.timeout(10):
        while not _refused_of(file, "standard"):
            await world.exchange().run(_arrived(0.5))
    assert _shortest_retry_of(file) == 6


def _refused_of(file, service_class):
    return _said(file)["shed"][service_class]["numerator"]


def _shortest_retry_of(file):
    return min(int(seconds) for seconds, parts in _said(file)["retry"].items() if parts)


def _said(file):
    return json.loads(file.read_text())["resources"][0]["layer"]["tidegate"]
