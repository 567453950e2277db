"""Real worker processes against real servers: gRPC and OpenAI's HTTP, which answer, refuse, break and stall."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import pytest
from aiohttp import web

from tidegate.bench.arrivals import Constant
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Outcome
from tidegate.bench.lengths import ConstantLength
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.summary import summary
from tidegate.bench.targets import Target
from tidegate.bench.workers import WorkerFailed, Workers
from tidegate.common.errors import Reason, TidegateError, abort, openai_body, retry_headers
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

OVERLOADED = TidegateError(Reason.SERVER_IS_OVERLOADED, "The queue is full.", retry_after_seconds=1.5)

EXPECTED = {"answer": Outcome.IN_TIME, "refuse": Outcome.REFUSED, "break": Outcome.FAILED, "gap": Outcome.FAILED,
            "stall": Outcome.DEADLINE_EXCEEDED}  # fmt: skip
"""What the fake servers do to each tenant, and what the ledger must call it."""


def load(tenants: list[str], rate: float = 20, seconds: float = 1) -> Load:
    return Load(
        name="contract",
        flows=tuple(
            Flow(
                name=tenant,
                arrivals=Constant(rate),
                duration_seconds=seconds,
                tenants={tenant: 1},
                answer_tokens=ConstantLength(5),
                # Generous, so that a busy machine changes nothing; the one that must miss it never answers.
                deadline_seconds=0.5 if tenant == "stall" else 20,
            )
            for tenant in tenants
        ),
    )


KEYS = {tenant: f"key-of-{tenant}" for tenant in EXPECTED}


class FakeInference(inference_pb2_grpc.InferenceServicer):
    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()

    async def Generate(self, request, context):
        tenant = dict(context.invocation_metadata())["authorization"].removeprefix("Bearer key-of-")
        self.requests[tenant] += 1
        if tenant == "refuse":
            await abort(context, OVERLOADED)
        yield pb.GenerateEvent(started=pb.Started(model="fake", prompt_token_count=len(request.tokens.token_ids)))
        for place in range(request.max_tokens - (tenant == "gap")):
            yield pb.GenerateEvent(delta=pb.Delta(text=" tide", token_ids=[place]))
            if tenant == "stall":
                await asyncio.sleep(600)
            if tenant == "break":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        usage = pb.Usage(completion_token_count=request.max_tokens)
        yield pb.GenerateEvent(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=usage))


@pytest.fixture
async def grpc_server():
    servicer = FakeInference()
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", servicer
    await server.stop(0)


async def openai_stream(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    tenant = request.headers["authorization"].removeprefix("Bearer key-of-")
    if tenant == "refuse":
        return web.json_response(openai_body(OVERLOADED), status=503, headers=dict(retry_headers(OVERLOADED)))
    assert body["messages"][0]["content"]
    assert int(request.headers["x-request-timeout-ms"]) > 0
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-request-id": "r-1"})
    await response.prepare(request)
    await response.write(b': queued position=1\n\ndata: {"choices":[{"index":0,"delta":{"content":""}}]}\n\n')
    for _ in range(body["max_tokens"]):
        await response.write(b'data: {"choices":[{"index":0,"delta":{"content":" tide"},"finish_reason":null}]}\n\n')
        if tenant == "stall":
            await asyncio.sleep(600)
        if tenant == "break":
            await response.write(
                b'data: {"error":{"message":"gone","type":"server_error","code":"internal_error"}}\n\n'
            )
            return response
    if tenant != "gap":
        await response.write(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n')
        await response.write(b'data: {"choices":[],"usage":{"completion_tokens":5}}\n\n')
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def http_server():
    application = web.Application()
    application.router.add_post("/v1/chat/completions", openai_stream)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield "{}:{}".format(*runner.addresses[0])
    await runner.cleanup()


def assert_as_expected(ledger):
    assert {record.tenant: record.outcome for record in ledger.records} == EXPECTED
    assert Counter(record.tenant for record in ledger.records) == dict.fromkeys(EXPECTED, 20)
    for record in ledger.records:
        (attempt,) = record.attempts
        assert record.planned <= attempt.sent <= attempt.ended
        if record.tenant == "answer":
            assert attempt.token_count == 5
            assert attempt.sent <= attempt.accepted <= attempt.first_token <= attempt.last_token <= attempt.ended
        if record.tenant == "refuse":
            assert (attempt.reason, attempt.retry_after_seconds) == ("SERVER_IS_OVERLOADED", 1.5)
            assert attempt.first_token is None


async def test_grpc_streams_end_as_what_they_were(grpc_server):
    address, servicer = grpc_server
    ledger = await run(Plan(load=load(list(EXPECTED))), Target(address=address, api_keys=KEYS), workers=2)
    assert_as_expected(ledger)
    assert servicer.requests == dict.fromkeys(EXPECTED, 20)
    figures = summary(ledger)
    assert figures.all.outcomes == {"in_time": 20, "refused": 20, "deadline_exceeded": 20, "failed": 40}
    assert figures.all.refused == {"SERVER_IS_OVERLOADED": 20}
    assert [worker.request_count for worker in ledger.workers] == [50, 50]


async def test_openai_streams_end_as_what_they_were(http_server):
    target = Target(address=http_server, protocol="http", api_keys=KEYS)
    assert_as_expected(await run(Plan(load=load(list(EXPECTED))), target))


async def test_workers_are_used_for_run_after_run(grpc_server):
    address, _ = grpc_server
    async with Workers(1) as workers:
        for name in ("first", "second"):
            target = Target(address=address, api_keys=KEYS, name=name)
            ledger = await run(Plan(load=load(["answer"], seconds=0.2)), target, workers=workers)
            assert ledger.name == name
            assert [record.outcome for record in ledger.records] == [Outcome.IN_TIME] * 4


async def test_a_run_that_is_stopped_gives_what_it_has(grpc_server):
    address, _ = grpc_server
    stop = asyncio.Event()
    target = Target(address=address, api_keys=KEYS)

    def stop_at_ten(progress):
        if progress.sent >= 10:
            stop.set()

    ledger = await run(Plan(load=load(["answer", "stall"], seconds=100)), target, on_progress=stop_at_ten, stop=stop)
    assert ledger.interrupted
    assert 10 <= len(ledger.records) < 4000


async def test_a_target_that_is_not_there_is_one_clear_error(unused_address):
    for protocol in ("grpc-web", "http"):
        with pytest.raises(WorkerFailed, match=unused_address.rpartition(":")[2]):
            await run(Plan(load=load(["answer"])), Target(address=unused_address, protocol=protocol))


@pytest.fixture
def unused_address():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{listener.getsockname()[1]}"
