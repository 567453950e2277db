"""API keys say whose request it is, and each tenant has a rate of its own."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.common.errors import Reason
from tidegate.common.remote_errors import from_rpc_error
from tidegate.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
BODY = {"prompt": "hello"}
BURST = 6


def mesh_settings(directory: Path) -> dict:
    keys = directory / "keys.yaml"
    keys.write_text("key-of-acme-1: acme\nkey-of-acme-2: acme\nkey-of-globex: globex\nkey-of-initech: initech\n")
    return {"api_keys_file": keys, "tenant_requests_per_second": 2, "tenant_burst_requests": BURST}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_becomes_its_tenant_and_goes_no_further(mesh, client):
    headers = {**bearer("key-of-acme-1"), "x-tidegate-tenant": "globex"}
    response = await client.post(CHAT, json=BODY, headers=headers)
    assert response.status_code == 200
    for seen in (response.json()["headers"], mesh.scheduler.seen[0]):
        assert seen["x-tidegate-tenant"] == "acme"
        assert "key-of-acme-1" not in str(seen)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Basic a2V5LW9mLWFjbWUtMQ=="},
        {"x-api-key": "key-of-acme-1"},
    ],
)
async def test_without_a_right_key_nothing_is_served(mesh, client, headers):
    response = await client.post(CHAT, json=BODY, headers=headers)
    assert response.status_code == 401
    assert response.json() == {
        "error": {
            "message": "The API key is missing or wrong.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }
    assert response.headers["x-tidegate-reason"] == "INVALID_API_KEY"
    assert response.headers["x-should-retry"] == "false"
    assert mesh.scheduler.seen == []


async def test_grpc_clients_without_a_key_are_told_in_grpc(mesh, stub):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(inference_pb2.GenerateRequest(text="hi")).read()
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.details() == "The API key is missing or wrong."


async def test_a_scheduler_that_is_dead_opens_no_door(mesh, client):
    mesh.endpoints("scheduler")
    await mesh.wait_healthy("scheduler", 0)
    assert (await client.post(CHAT, json=BODY)).status_code == 401
    assert (await client.post(CHAT, json=BODY, headers=bearer("key-of-acme-2"))).status_code == 200
    mesh.endpoints("scheduler", mesh.scheduler_server.port)
    await mesh.wait_healthy("scheduler", 1)


async def test_probes_need_no_key(mesh, client):
    assert [(await client.get(path)).status_code for path in ("/health", "/healthz")] == [200, 200]
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_each_tenant_has_its_own_burst_and_is_told_when_to_come_back(mesh, client):
    codes = [(await client.post(CHAT, json=BODY, headers=bearer("key-of-globex"))).status_code for _ in range(BURST)]
    assert codes == [200] * BURST
    refused = [await client.post(CHAT, json=BODY, headers=bearer("key-of-globex")) for _ in range(3)]
    response = refused[-1]
    assert response.status_code == 429
    assert response.json()["error"] == {
        "message": "This tenant sends requests faster than its rate allows.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert response.headers["x-tidegate-reason"] == "RATE_LIMIT_EXCEEDED"
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "500")
    assert len(mesh.scheduler.seen) <= BURST + 2
    # Another tenant is not disturbed, and the bucket fills again at its rate.
    assert (await client.post(CHAT, json=BODY, headers=bearer("key-of-initech"))).status_code == 200
    await asyncio.sleep(0.6)
    assert (await client.post(CHAT, json=BODY, headers=bearer("key-of-globex"))).status_code == 200


async def test_the_keys_of_a_tenant_share_its_bucket(mesh, client):
    await asyncio.sleep(BURST / 2 + 0.2)
    headers = [bearer(f"key-of-acme-{1 + index % 2}") for index in range(BURST + 3)]
    codes = [(await client.post(CHAT, json=BODY, headers=header)).status_code for header in headers]
    assert 429 in codes


async def test_grpc_clients_over_their_rate_get_retry_info(mesh):
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        error = None
        deadline = time.monotonic() + 5
        while error is None and time.monotonic() < deadline:
            call = stub.Generate(
                inference_pb2.GenerateRequest(text="hi"), metadata=(("authorization", "Bearer key-of-initech"),)
            )
            try:
                event = await call.read()
                assert json.loads(event.delta.text)["headers"]["x-tidegate-tenant"] == "initech"
            except grpc.aio.AioRpcError as caught:
                error = caught
    assert error is not None
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 500
    assert metadata["grpc-retry-pushback-ms"] == "500"


async def generate_in_mesh(stub, tenant: str, **more: str) -> None:
    metadata = (("x-tidegate-tenant", tenant), *((f"x-tidegate-{name}", value) for name, value in more.items()))
    await stub.Generate(inference_pb2.GenerateRequest(text="hi"), metadata=metadata, timeout=5).read()


async def test_the_prompts_of_a_stream_have_their_tenants_rate_at_the_mesh_listener(mesh):
    async with grpc.aio.insecure_channel(mesh.mesh) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for _ in range(BURST):
            await generate_in_mesh(stub, "hooli")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            for _ in range(BURST):
                await generate_in_mesh(stub, "hooli")
        # Another tenant is not disturbed, nor a stream of the same one that goes on at another replica.
        await generate_in_mesh(stub, "pied-piper")
        for _ in range(BURST + 3):
            await generate_in_mesh(stub, "hooli", replica=mesh.replicas[0].address)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc_error(caught.value)
    assert (error.reason, error.retry_after_seconds) == (Reason.RATE_LIMIT_EXCEEDED, 0.5)
    assert len(mesh.scheduler.seen) <= BURST + 3


async def test_services_that_no_client_reaches_have_no_rate(mesh):
    async with grpc.aio.insecure_channel(mesh.mesh) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for _ in range(BURST * 3):
            await stub.Models(inference_pb2.ModelsRequest(), metadata=(("x-tidegate-tenant", "hooli"),), timeout=5)
