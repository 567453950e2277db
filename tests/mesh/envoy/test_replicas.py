"""Replicas come, go, fail and refuse; requests find one that works."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import grpc
import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.v1 import inference_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
BODY = {"prompt": "hello"}


async def names(client, count: int) -> list[str]:
    return [(await client.post(CHAT, json=BODY)).json().get("name") for _ in range(count)]


async def until(condition, timeout_seconds: float = 5.0) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_replicas_join_and_leave_without_a_restart(mesh, client, start_replica):
    third = await start_replica("replica-2")
    mesh.endpoints("model", *mesh.replicas, third)
    await mesh.wait_healthy("model", 3)
    assert set(await names(client, 30)) == {"replica-0", "replica-1", "replica-2"}
    mesh.endpoints("model", third)
    await mesh.wait_healthy("model", 1)
    assert set(await names(client, 10)) == {"replica-2"}
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)
    assert "replica-2" not in await names(client, 10)
    assert mesh.process.poll() is None


async def test_a_stream_of_a_replica_that_leaves_the_file_ends_as_it_would(mesh, client):
    mesh.scheduler.set_headers = {"x-tidegate-replica": mesh.replicas[0].address}
    prompt = json.dumps({"do": "stream", "count": 20, "interval_seconds": 0.05})
    chunks = []
    async with client.stream("POST", CHAT, json={"prompt": prompt}) as response:
        async for chunk in response.aiter_raw():
            if not chunks:
                mesh.endpoints("model", mesh.replicas[1])
            chunks.append(chunk)
    assert b"".join(chunks).count(b"chunk") == 20
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)


async def test_the_next_of_the_list_takes_a_request_that_the_first_cannot_connect(mesh, client, start_replica):
    dying = await start_replica("dying")
    mesh.endpoints("model", *mesh.replicas, dying)
    await mesh.wait_healthy("model", 3)
    mesh.scheduler.set_headers = {"x-tidegate-replica": f"{dying.address},{mesh.replicas[1].address}"}
    assert await names(client, 2) == ["dying", "dying"]
    await dying.stop()
    assert await names(client, 6) == ["replica-1"] * 6
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)


async def test_a_replica_that_dies_before_the_first_byte_is_replaced(mesh, client, lone_service):
    mesh.endpoints("model", *mesh.replicas, lone_service.port)
    await mesh.wait_healthy("model", 3)
    mesh.scheduler.set_headers = {"x-tidegate-replica": f"127.0.0.1:{lone_service.port},{mesh.replicas[0].address}"}
    prompts = ["x" * 5, "x" * 6, "x" * 2_000_000]
    requests = [asyncio.create_task(client.post(CHAT, json={"prompt": prompt})) for prompt in prompts]
    await lone_service.wait_held(3)
    lone_service.signal(signal.SIGKILL)
    reports = [response.json() for response in await asyncio.gather(*requests)]
    assert [(report["name"], report["bytes"]) for report in reports] == [
        ("replica-0", 5),
        ("replica-0", 6),
        ("replica-0", 2_000_000),
    ]
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)


async def test_a_replica_that_stops_while_it_works_is_said_to_be_unavailable(mesh, client, start_replica):
    stopping = await start_replica("stopping")
    stopping.inference.hang = True
    mesh.endpoints("model", *mesh.replicas, stopping)
    await mesh.wait_healthy("model", 3)
    mesh.scheduler.set_headers = {"x-tidegate-replica": stopping.address}
    request = asyncio.create_task(client.post(CHAT, json=BODY))
    await until(lambda: stopping.inference.open_streams == 1)
    await stopping.stop()
    response = await request
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_unavailable")
    assert response.headers["retry-after"] == "1"
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)


async def test_a_replica_that_says_it_cannot_work_is_passed_over(mesh, client):
    first, second = mesh.replicas
    first.inference.refuse_with = TidegateError(Reason.REPLICA_UNAVAILABLE, "no Triton", retry_after_seconds=1)
    mesh.scheduler.set_headers = {"x-tidegate-replica": f"{first.address},{second.address}"}
    assert await names(client, 3) == ["replica-1"] * 3
    second.inference.refuse_with = first.inference.refuse_with
    response = await client.post(CHAT, json=BODY)
    assert (response.status_code, response.json()["error"]["message"]) == (503, "no Triton")


async def test_a_refusal_is_told_and_neither_retried_nor_held_against_the_replica(mesh, client, stub):
    first, second = mesh.replicas
    first.inference.refuse_with = TidegateError(Reason.SERVER_IS_OVERLOADED, "full", retry_after_seconds=1)
    mesh.scheduler.set_headers = {"x-tidegate-replica": f"{first.address},{second.address}"}
    ejected = await mesh.stat("cluster.model.outlier_detection.ejections_enforced_total")
    for _ in range(25):
        response = await client.post(CHAT, json=BODY)
        assert (response.status_code, response.json()["error"]["message"]) == (503, "full")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(inference_pb2.GenerateRequest(text="hi")).read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert len(first.inference.seen) == 26
    assert second.inference.seen == []
    await asyncio.sleep(1.2)  # Past an interval of the outlier detection.
    assert await mesh.stat("cluster.model.outlier_detection.ejections_enforced_total") == ejected
    assert await mesh.healthy_count("model") == 2
    first.inference.refuse_with = None
    assert await names(client, 1) == ["replica-0"]


async def test_an_error_of_the_engine_is_not_held_against_the_replica(mesh, client):
    first = mesh.replicas[0]
    mesh.scheduler.set_headers = {"x-tidegate-replica": first.address}
    for _ in range(10):
        response = await client.post(CHAT, json={"prompt": '{"do": "crash"}'})
        assert response.status_code == 500
    assert await mesh.healthy_count("model") == 2


async def test_a_replica_that_drops_connections_is_ejected_and_returns(mesh, client):
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    dropping = await asyncio.start_server(drop, "127.0.0.1", 0)
    port = dropping.sockets[0].getsockname()[1]
    mesh.endpoints("model", *mesh.replicas, port)
    mesh.scheduler.set_headers = {"x-tidegate-replica": f"127.0.0.1:{port},{mesh.replicas[1].address}"}
    assert await names(client, 8) == ["replica-1"] * 8
    assert await mesh.healthy_count("model") == 2
    dropping.close()
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)


async def test_a_replica_that_is_not_ready_gets_nothing_by_itself(mesh, client):
    await mesh.replicas[0].server.set_serving(False)
    await mesh.wait_healthy("model", 1)
    assert set(await names(client, 6)) == {"replica-1"}
    await mesh.replicas[0].server.set_serving(True)
    await mesh.wait_healthy("model", 2)


async def test_without_a_scheduler_the_load_that_replicas_report_decides(mesh, client):
    first, second = mesh.replicas
    first.inference.utilization, second.inference.utilization = 0.9, 0.1
    async with asyncio.timeout(10):
        while (await names(client, 40)).count("replica-1") < 30:
            await asyncio.sleep(0.1)


async def test_a_file_that_is_no_endpoints_changes_nothing(mesh, client):
    path = mesh.settings.endpoints_directory / "model.yaml"
    fresh = path.with_name("new")
    fresh.write_text("resources: [nonsense")
    os.replace(fresh, path)
    await asyncio.sleep(0.3)
    for replica in mesh.replicas:
        mesh.scheduler.set_headers = {"x-tidegate-replica": replica.address}
        assert await names(client, 1) == [replica.inference.name]
    mesh.endpoints("model", *mesh.replicas)


async def test_a_stream_that_breaks_in_the_middle_does_not_look_complete(mesh, stub, client, start_replica):
    breaking = await start_replica("breaking")
    mesh.endpoints("model", *mesh.replicas, breaking)
    await mesh.wait_healthy("model", 3)
    mesh.scheduler.set_headers = {"x-tidegate-replica": breaking.address}
    text = json.dumps({"do": "stream", "count": 1000, "interval_seconds": 0.01})
    call = stub.Generate(inference_pb2.GenerateRequest(text=text))
    assert (await call.read()).delta.text == "chunk 0"
    await breaking.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL}
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)


async def test_sigterm_ends_envoy_soon(mesh, client):
    """Last in the module: nothing can follow it."""
    await client.post(CHAT, json=BODY)
    start = time.monotonic()
    os.kill(mesh.process.pid, signal.SIGTERM)
    assert await asyncio.to_thread(mesh.process.wait, 10) == 0
    assert time.monotonic() - start < 5
