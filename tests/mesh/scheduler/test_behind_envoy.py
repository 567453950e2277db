"""The scheduler behind a real Envoy: what clients see, and what becomes of requests that are held."""

from __future__ import annotations

import asyncio
import json
import signal

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from tidegate.common import headers
from tidegate.v1 import inference_pb2

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
HELD_SECONDS = 0.6
"""Three times Envoy's message_timeout: what is held for so long is held because the scheduler asked for it."""


async def _events(call):
    return [event async for event in call]


def _generate(inference, request_id="r", **options):
    return asyncio.create_task(
        _events(inference.Generate(inference_pb2.GenerateRequest(request_id=request_id), **options))
    )


async def test_a_request_goes_to_the_replica_that_granted_the_credit(mesh, start_scheduler, inference):
    await start_scheduler()
    mesh.replica.grant("c1")
    await asyncio.sleep(0.1)
    await asyncio.wait_for(_generate(inference), 5)
    (seen,) = mesh.replica.seen
    assert seen[headers.REPLICA] == mesh.replica.address
    assert seen[headers.CREDIT] == "c1"
    assert seen[headers.SERVICE_CLASS] == "standard"
    assert headers.TIMEOUT_MS not in seen
    assert seen[headers.TENSOR]


async def test_a_request_is_held_until_a_credit_comes(mesh, start_scheduler, inference):
    await start_scheduler()
    answer = _generate(inference)
    await mesh.replica.demand(1)
    await asyncio.sleep(HELD_SECONDS)
    assert not mesh.replica.seen
    mesh.replica.grant("c1")
    await asyncio.wait_for(answer, 5)
    assert mesh.replica.seen[0][headers.CREDIT] == "c1"
    assert float(mesh.replica.seen[0][headers.QUEUE_MS]) >= HELD_SECONDS * 1000 * 0.9


async def test_a_client_that_leaves_while_it_waits_frees_its_place(mesh, start_scheduler, inference):
    await start_scheduler()
    first, second = _generate(inference, "first"), _generate(inference, "second")
    await mesh.replica.demand(2)
    first.cancel()
    await mesh.replica.demand(1)
    mesh.replica.grant("c1")
    await asyncio.wait_for(second, 5)
    assert [seen[headers.CREDIT] for seen in mesh.replica.seen] == ["c1"]


async def test_an_http_client_that_leaves_while_it_waits_frees_its_place(mesh, start_scheduler):
    await start_scheduler()
    async with httpx.AsyncClient() as client:
        waiting = asyncio.create_task(client.post(f"{mesh.url}/v1/chat/completions", json=BODY))
        await mesh.replica.demand(1)
        waiting.cancel()
        await mesh.replica.demand(0)


async def test_a_refusal_over_http_is_an_openai_error_with_a_time(mesh, start_scheduler):
    await start_scheduler(held_request_limit=1)
    async with httpx.AsyncClient() as client:
        waiting = asyncio.create_task(client.post(f"{mesh.url}/v1/chat/completions", json=BODY))
        await mesh.replica.demand(1)
        refused = await client.post(f"{mesh.url}/v1/chat/completions", json=BODY)
        waiting.cancel()
    assert refused.status_code == 503
    assert refused.headers["content-type"] == "application/json"
    error = refused.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "server_is_overloaded")
    assert refused.headers[headers.REASON] == "SERVER_IS_OVERLOADED"
    assert 5 <= int(refused.headers["retry-after"]) <= 8
    assert 5000 <= int(refused.headers["retry-after-ms"]) <= 7500
    assert "x-should-retry" not in refused.headers
    assert refused.headers["x-request-id"]


async def test_bad_input_over_http_is_refused_without_a_time(mesh, start_scheduler):
    await start_scheduler()
    async with httpx.AsyncClient() as client:
        refused = await client.post(f"{mesh.url}/v1/chat/completions", content=b'{"model":')
        empty = await client.post(f"{mesh.url}/v1/chat/completions")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert (empty.status_code, empty.json()["error"]["code"]) == (400, "invalid_json")


async def test_a_refusal_over_grpc_is_a_status_with_details(mesh, start_scheduler, inference):
    await start_scheduler(held_request_limit=1)
    waiting = _generate(inference, "first")
    await mesh.replica.demand(1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(_generate(inference, "second"), 5)
    waiting.cancel()
    error = raised.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "The scheduler is at its limit of 1 requests"
    metadata = {**dict(error.initial_metadata()), **dict(error.trailing_metadata())}
    assert metadata[headers.REASON] == "SERVER_IS_OVERLOADED"
    assert 5000 <= int(metadata["grpc-retry-pushback-ms"]) <= 7500
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "SERVER_IS_OVERLOADED"
    assert status.details[1].Unpack(retry)
    assert 5 <= retry.retry_delay.ToSeconds() <= 8


async def test_a_deadline_that_passes_in_the_queue_is_told_by_the_scheduler(mesh, start_scheduler):
    await start_scheduler(standard_deadline_seconds=0.5)
    async with httpx.AsyncClient() as client:
        refused = await client.post(f"{mesh.url}/v1/chat/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert refused.headers["x-should-retry"] == "false"


async def test_a_body_that_does_not_come_is_refused_by_the_scheduler(mesh, start_scheduler):
    await start_scheduler(body_wait_seconds=0.5)
    url = httpx.URL(mesh.url)
    # An HTTP library would send the whole body before it looks at the answer.
    reader, writer = await asyncio.open_connection(url.host, url.port)
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: mesh", "content-type: application/json", "content-length: 99"]
    writer.write("\r\n".join([*lines, "", '{"model":']).encode())
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code": "invalid_http"' in answer


async def test_held_requests_go_on_when_the_scheduler_is_killed(mesh, start_scheduler, inference):
    scheduler = await start_scheduler()
    held = [_generate(inference, str(number)) for number in range(3)]
    await mesh.replica.demand(3)
    assert not mesh.replica.seen
    scheduler.kill()
    await scheduler.wait()
    await asyncio.wait_for(asyncio.gather(*held), 5)
    assert [headers.CREDIT in seen for seen in mesh.replica.seen] == [False] * 3
    await asyncio.wait_for(_generate(inference, "later"), 5)


async def test_held_requests_go_on_when_the_scheduler_hangs(mesh, start_scheduler, inference):
    scheduler = await start_scheduler()
    held = _generate(inference)
    await mesh.replica.demand(1)
    scheduler.send_signal(signal.SIGSTOP)
    try:
        await asyncio.wait_for(held, 5)
        await asyncio.wait_for(_generate(inference, "later"), 5)
    finally:
        scheduler.send_signal(signal.SIGCONT)


async def test_held_requests_go_on_when_the_scheduler_is_ended(mesh, start_scheduler, inference):
    scheduler = await start_scheduler()
    held = _generate(inference)
    await mesh.replica.demand(1)
    scheduler.terminate()
    await asyncio.wait_for(held, 10)
    await asyncio.wait_for(scheduler.wait(), 5)
    assert scheduler.returncode == 0


async def test_a_request_that_names_its_replica_passes_at_once(mesh, start_scheduler, inference):
    await start_scheduler()
    resumed = _generate(inference, metadata=((headers.REPLICA, mesh.replica.address),))
    await asyncio.wait_for(resumed, 5)
    assert headers.CREDIT not in mesh.replica.seen[0]


async def test_a_known_answer_takes_the_route_of_the_cache(mesh, start_scheduler):
    mesh.services.known.add(b"k" * 32)
    await start_scheduler()
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{mesh.url}/v1/chat/completions", content=json.dumps({**BODY, "seed": 1}))
    assert (answer.status_code, answer.text) == (200, "replayed")
