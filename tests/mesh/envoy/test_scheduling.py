"""The scheduler holds requests and says where they go."""

from __future__ import annotations

import asyncio
import json

import pytest

from tidegate.v1 import inference_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
BODY = {"prompt": "hello"}


async def until(condition, timeout_seconds: float = 5.0) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_schedulers_headers_reach_the_replica_that_it_named(mesh, client, stub):
    for replica in mesh.replicas * 2:
        mesh.scheduler.set_headers = {
            "x-tidegate-replica": replica.address,
            "x-tidegate-credit": "credit-1",
            "x-tidegate-tensor": "dGVuc29y",
        }
        report = (await client.post(CHAT, json=BODY)).json()
        assert report["name"] == replica.inference.name
        assert (report["headers"]["x-tidegate-credit"], report["headers"]["x-tidegate-tensor"]) == (
            "credit-1",
            "dGVuc29y",
        )
        events = [event async for event in stub.Generate(inference_pb2.GenerateRequest(text="hi"))]
        assert json.loads(events[0].delta.text)["name"] == replica.inference.name


async def test_a_brownouts_bound_reaches_the_replica_and_its_step_the_client(mesh, client, stub):
    mesh.scheduler.set_headers = {"x-tidegate-max-tokens": "256", "x-tidegate-brownout": "2"}
    response = await client.post(CHAT, json=BODY)
    assert response.json()["headers"]["x-tidegate-max-tokens"] == "256"
    assert response.headers["x-tidegate-brownout"] == "2"
    call = stub.Generate(inference_pb2.GenerateRequest(text="hi"))
    assert json.loads((await call.read()).delta.text)["headers"]["x-tidegate-max-tokens"] == "256"
    assert dict(await call.initial_metadata())["x-tidegate-brownout"] == "2"


async def test_without_a_name_all_replicas_are_used(mesh, client):
    names = {(await client.post(CHAT, json=BODY)).json()["name"] for _ in range(10)}
    assert names == {"replica-0", "replica-1"}


async def test_a_name_that_is_no_replica_is_balanced(mesh, client):
    for name in ("127.0.0.1:1", "nonsense", "10.0.0.1:80"):
        mesh.scheduler.set_headers = {"x-tidegate-replica": name}
        assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_credentials_are_not_shown_to_the_scheduler(mesh, client):
    await client.post(CHAT, json=BODY, headers={"authorization": "Bearer k", "cookie": "c=1"})
    assert not {"authorization", "cookie"} & set(mesh.scheduler.seen[0])


async def test_a_request_is_held_until_the_scheduler_lets_it_go_and_the_stream_ends_then(mesh, client):
    mesh.scheduler.hold = asyncio.Event()
    request = asyncio.create_task(client.post(CHAT, json=BODY))
    await asyncio.sleep(2.5)  # Longer than Envoy waits by itself.
    assert not request.done()
    mesh.scheduler.hold.set()
    assert (await request).status_code == 200
    await until(lambda: mesh.scheduler.open_streams == 0)


async def test_a_client_that_leaves_the_queue_ends_its_stream_at_the_scheduler(mesh, client, stub):
    mesh.scheduler.hold = asyncio.Event()
    over_http = asyncio.create_task(client.post(CHAT, json=BODY))
    over_grpc = stub.Generate(inference_pb2.GenerateRequest(text="hi"))
    reading = asyncio.create_task(over_grpc.read())
    await until(lambda: mesh.scheduler.open_streams == 2)
    over_http.cancel()
    over_grpc.cancel()
    await until(lambda: mesh.scheduler.open_streams == 0)
    await asyncio.gather(over_http, reading, return_exceptions=True)
    assert [replica.inference.seen for replica in mesh.replicas] == [[], []]


async def test_no_default_limit_of_envoy_lets_requests_skip_the_queue(mesh):
    """1,024 is the default of a cluster's circuit breakers, below the target of 10,000 streams at once."""
    for name in ("model", "cache", "preprocess", "scheduler", "cache_or_model", "lite", "lite_or_model"):
        (default, *_) = (await mesh.cluster(name))["circuit_breakers"]["thresholds"]
        # Retries have a budget instead of a bound.
        limits = {key: value for key, value in default.items() if key.startswith("max_") and key != "max_retries"}
        assert limits == dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100_000)


async def test_a_known_answer_is_replayed_by_the_cache(mesh, client, stub):
    mesh.scheduler.set_headers = {"x-tidegate-route": "cache", "x-tidegate-answer-key": "00ff"}
    mesh.scheduler.clear_route = True
    report = (await client.post(CHAT, json=BODY)).json()
    assert (report["name"], report["headers"]["x-tidegate-answer-key"]) == ("cache", "00ff")
    events = [event async for event in stub.Generate(inference_pb2.GenerateRequest(text="hi"))]
    assert json.loads(events[0].delta.text)["name"] == "cache"


async def test_the_lite_model_has_replicas_of_its_own(mesh, client, stub):
    mesh.scheduler.set_headers = {"x-tidegate-route": "lite", "x-tidegate-replica": mesh.lite.address}
    mesh.scheduler.clear_route = True
    assert (await client.post(CHAT, json=BODY)).json()["name"] == "lite"
    events = [event async for event in stub.Generate(inference_pb2.GenerateRequest(text="hi"))]
    assert json.loads(events[0].delta.text)["name"] == "lite"


async def test_where_no_lite_replica_is_left_the_others_answer(mesh, client):
    mesh.scheduler.set_headers = {"x-tidegate-route": "lite", "x-tidegate-replica": mesh.lite.address}
    mesh.scheduler.clear_route = True
    await mesh.lite.stop()
    # At first Envoy does not know that it is gone, as a rule; later it does.
    assert (await client.post(CHAT, json=BODY)).json()["name"].startswith("replica-")
    await mesh.wait_healthy("lite", 0)
    assert (await client.post(CHAT, json=BODY)).json()["name"].startswith("replica-")


async def test_a_cache_that_is_gone_is_a_miss(mesh, client):
    mesh.scheduler.set_headers = {"x-tidegate-route": "cache", "x-tidegate-answer-key": "00ff"}
    mesh.scheduler.clear_route = True
    assert (await client.post(CHAT, json=BODY)).json()["name"] == "cache"
    await mesh.cache.stop()
    # At first Envoy does not know that it is gone, as a rule; later it does.
    assert (await client.post(CHAT, json=BODY)).json()["name"].startswith("replica-")
    await mesh.wait_healthy("cache", 0)
    assert (await client.post(CHAT, json=BODY)).json()["name"].startswith("replica-")
