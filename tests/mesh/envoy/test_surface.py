"""What clients see of the mesh on each protocol, when nothing is wrong."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import socket
import struct
import time

import grpc
import httpx
import pytest
from google.api import httpbody_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tidegate.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
GENERATE = "/tidegate.v1.Inference/Generate"


def order(**fields) -> str:
    return json.dumps(fields)


async def texts(call) -> list[str]:
    return [event.delta.text async for event in call]


async def test_json_over_http1_reaches_a_replica_as_http_body(mesh, client):
    response = await client.post(CHAT, json={"prompt": "hello"})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.json()["name"].startswith("replica-")


async def test_completions_and_query_parameters_and_charset_are_taken(mesh, client):
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    response = await client.post("/v1/completions?api-version=1", content=b'{"prompt": "hello"}', headers=kind)
    assert response.status_code == 200, response.text


async def test_a_body_reaches_the_service_byte_for_byte(mesh, client):
    body = json.dumps({"prompt": "€ \\u0000 \x7f" + "y" * 3_000_000}).encode()
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert mesh.scheduler.bodies == [body]
    assert response.json()["bytes"] == len(json.loads(body)["prompt"])


async def test_models_are_listed_and_an_id_may_hold_a_slash(mesh, client):
    assert (await client.get("/v1/models")).json()["asked"] == ""
    assert (await client.get("/v1/models/org/name-1")).json()["asked"] == "org/name-1"
    assert (await client.get("/v1/models/org%2Fname-1")).json()["asked"] == "org/name-1"
    assert mesh.scheduler.seen == []


async def test_server_sent_events_arrive_one_by_one(mesh, client):
    arrivals: list[float] = []
    chunks: list[bytes] = []
    prompt = order(do="stream", count=4, interval_seconds=0.1)
    async with client.stream("POST", CHAT, json={"prompt": prompt, "stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream"
        async for chunk in response.aiter_raw():
            arrivals.append(time.monotonic())
            chunks.append(chunk)
    assert chunks == [f"data: chunk {index}\n\n".encode() for index in range(4)]
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(arrivals))


async def test_an_answer_may_be_larger_than_the_buffers_on_its_way(mesh, client):
    response = await client.post(CHAT, json={"prompt": order(do="flood", count=1, bytes=2_000_000)})
    assert (response.status_code, len(response.content)) == (200, len("data: \n\n") + 2_000_000)


async def test_a_client_that_leaves_ends_the_stream_at_the_replica(mesh, client):
    prompt = order(do="stream", count=1000, interval_seconds=0.02)
    async with client.stream("POST", CHAT, json={"prompt": prompt}) as response:
        async for _ in response.aiter_raw():
            break
    deadline = time.monotonic() + 0.5
    while any(replica.inference.open_streams for replica in mesh.replicas):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_client_that_does_not_read_stops_the_replica(mesh):
    """Buffers on the way hold little, so the pressure reaches the service that can coalesce."""
    prompt = order(do="flood", count=2_000, bytes=16_384)
    body = json.dumps({"prompt": prompt}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", mesh.settings.ingress_port))
        slow.sendall(head.encode() + body)
        await asyncio.sleep(1.0)
        assert sum(replica.inference.open_streams for replica in mesh.replicas) == 1
        sent = await mesh.stat("cluster.model.upstream_cx_rx_bytes_buffered")
        assert sent < 1_000_000


async def test_generate_over_grpc_streams(mesh, stub):
    call = stub.Generate(inference_pb2.GenerateRequest(text=order(do="stream", count=3, interval_seconds=0.01)))
    assert await texts(call) == ["chunk 0", "chunk 1", "chunk 2"]
    assert "x-request-id" in dict(await call.initial_metadata())


async def test_the_openai_methods_can_be_called_over_grpc(mesh, stub):
    body = httpbody_pb2.HttpBody(content_type="application/json", data=b'{"prompt": "hello"}')
    replies = [json.loads(reply.data) async for reply in stub.ChatCompletions(body)]
    assert [reply["bytes"] for reply in replies] == [5]


async def test_generate_many_stays_open_both_ways_and_has_no_limit_on_its_sum(mesh, stub):
    call = stub.GenerateMany()
    for index in range(8):
        text = "x" * 1_000_000
        await call.write(inference_pb2.GenerateRequest(request_id=str(index), text=text))
        event = await asyncio.wait_for(call.read(), 5)
        assert (event.request_id, len(event.delta.text)) == (str(index), 1_000_000)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert mesh.scheduler.seen == []


async def test_deadline_of_a_grpc_client_reaches_scheduler_and_replica(mesh, stub):
    (report,) = await texts(stub.Generate(inference_pb2.GenerateRequest(text="hi"), timeout=33))
    assert mesh.scheduler.seen[0]["grpc-timeout"]
    assert json.loads(report)["name"]


def grpc_web_frame(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def grpc_web_frames(body: bytes) -> list[tuple[int, bytes]]:
    frames = []
    while body:
        flag, length = struct.unpack(">BI", body[:5])
        frames.append((flag, body[5 : 5 + length]))
        body = body[5 + length :]
    return frames


@pytest.mark.parametrize("text_mode", [False, True])
async def test_grpc_web_over_http1(mesh, client, text_mode):
    request = grpc_web_frame(inference_pb2.GenerateRequest(text="hello").SerializeToString())
    kind = "application/grpc-web-text" if text_mode else "application/grpc-web+proto"
    content = base64.b64encode(request) if text_mode else request
    response = await client.post(GENERATE, content=content, headers={"content-type": kind, "accept": kind})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind.removesuffix("+proto"))
    parts = response.content
    if text_mode:
        parts = b"".join(base64.b64decode(part + b"=") for part in parts.split(b"=") if part)
    (_, message), (trailer_flag, trailers) = grpc_web_frames(parts)
    assert json.loads(inference_pb2.GenerateEvent.FromString(message).delta.text)["bytes"] == 5
    assert trailer_flag == 0x80
    assert b"grpc-status:0" in trailers
    # The scheduler sees plain gRPC, whatever the client's framing.
    assert mesh.scheduler.bodies == [request]


async def test_reflection_through_the_ingress_names_the_services(mesh):
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in reply.list_services_response.service}
    assert "tidegate.v1.Inference" in names


async def test_health_through_the_ingress(mesh, client):
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    for path in ("/healthz", "/health"):
        assert (await client.get(path)).status_code == 200


async def test_health_of_the_mesh_says_when_no_replica_is_there(mesh, client):
    mesh.endpoints("model")
    await mesh.wait_healthy("model", 0)
    assert (await client.get("/health")).status_code == 503
    assert (await client.get("/healthz")).status_code == 200
    mesh.endpoints("model", *mesh.replicas)
    await mesh.wait_healthy("model", 2)
    assert (await client.get("/health")).status_code == 200


async def test_headers_that_mean_something_inside_are_removed_from_requests(mesh, client):
    forged = {
        "x-tidegate-tenant": "somebody-else",
        "X-Tidegate-Replica": "127.0.0.1:1",
        "x-tidegate-credit": "stolen",
        "x-tidegate-route": "cache",
        "x-tidegate-anything": "1",
        "x-tidegate-arrived": "1",
        "x-tidegate-whole": "1",
        "x_tidegate_tenant": "underscored",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-retry-on": "5xx",
        "authorization": "Bearer of-no-use-inside",
        "cookie": "a=b",
    }
    response = await client.post(CHAT, json={"prompt": "hello"}, headers=forged)
    report = response.json()
    assert report["name"].startswith("replica-")
    for seen in (report["headers"], mesh.scheduler.seen[0]):
        names = {name for name in seen if name.startswith(("x-tidegate", "x_tidegate", "authorization", "cookie"))}
        assert names == {"x-tidegate-tenant", "x-tidegate-arrived", "x-tidegate-whole"}
        assert 1 < float(seen["x-tidegate-arrived"]) <= float(seen["x-tidegate-whole"])
        assert seen["x-tidegate-tenant"] == "default"
        assert "of-no-use-inside" not in str(seen)
        assert not {"x-envoy-upstream-rq-timeout-ms", "x-envoy-retry-on"} & set(seen)


async def test_grpc_clients_cannot_forge_headers_either(mesh, stub):
    metadata = (("x-tidegate-tenant", "somebody-else"), ("x-tidegate-replica", "127.0.0.1:1"))
    (report,) = await texts(stub.Generate(inference_pb2.GenerateRequest(text="hi"), metadata=metadata))
    seen = json.loads(report)["headers"]
    assert seen["x-tidegate-tenant"] == "default"
    assert "x-tidegate-replica" not in seen


async def test_the_request_id_is_the_meshs_own_and_the_same_everywhere(mesh, client):
    response = await client.post(CHAT, json={"prompt": "hello"}, headers={"x-request-id": "chosen-by-the-client"})
    request_id = response.headers["x-request-id"]
    assert request_id != "chosen-by-the-client"
    assert response.json()["headers"]["x-request-id"] == request_id
    assert mesh.scheduler.seen[0]["x-request-id"] == request_id


async def test_nothing_of_the_inside_shows_in_a_response(mesh, client):
    response = await client.post(CHAT, json={"prompt": "hello"})
    shown = {name for name in response.headers if name.startswith(("x-", "grpc-"))}
    assert shown == {"x-request-id"}


async def test_a_replicas_load_shows_in_no_response(mesh, client, stub):
    call = stub.Generate(inference_pb2.GenerateRequest(text="hi"))
    assert len(await texts(call)) == 1
    assert "endpoint-load-metrics-bin" not in dict(await call.trailing_metadata())
    web = grpc_web_frame(inference_pb2.GenerateRequest(text="hello").SerializeToString())
    kind = {"content-type": "application/grpc-web+proto"}
    assert b"endpoint-load-metrics" not in (await client.post(GENERATE, content=web, headers=kind)).content


async def test_browsers_of_other_origins_are_told_nothing(mesh, client):
    asks = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    response = await client.options(CHAT, headers=asks)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


async def test_http2_without_tls_works_for_json(mesh):
    process = await asyncio.create_subprocess_exec(
        "curl", "-s", "--http2-prior-knowledge", "-H", "content-type: application/json", "-d", '{"prompt": "hello"}',
        "-w", "\n%{http_version} %{http_code}", f"{mesh.url}{CHAT}", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 10)
    body, version = output.decode().rsplit("\n", 1)
    assert version == "2 200"
    assert json.loads(body)["bytes"] == 5


async def test_the_mesh_listener_trusts_headers_and_keeps_request_ids(mesh):
    replica = mesh.replicas[1]
    metadata = (("x-tidegate-replica", replica.address), ("x-tidegate-tenant", "t1"), ("x-request-id", "r-1"))
    async with grpc.aio.insecure_channel(mesh.mesh) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        (report,) = await texts(stub.Generate(inference_pb2.GenerateRequest(text="hi"), metadata=metadata))
    report = json.loads(report)
    assert report["name"] == "replica-1"
    assert (report["headers"]["x-tidegate-tenant"], report["headers"]["x-request-id"]) == ("t1", "r-1")
    assert mesh.scheduler.seen == []


async def test_the_mesh_listener_schedules_requests_that_name_no_replica(mesh):
    async with grpc.aio.insecure_channel(mesh.mesh) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        (report,) = await texts(stub.Generate(inference_pb2.GenerateRequest(text="hi")))
    assert json.loads(report)["headers"]["x-tidegate-tenant"] == "default"
    assert len(mesh.scheduler.seen) == 1


async def test_services_reach_each_other_only_through_the_mesh_listener(mesh):
    async with httpx.AsyncClient() as client:
        headers = {"content-type": "application/grpc", "te": "trailers"}
        for method in ("/tidegate.v1.Cache/Clear", "/tidegate.v1.Scheduler/Watch", "/tidegate.v1.Replica/Credits"):
            response = await client.post(mesh.url + method, headers=headers)
            assert response.headers["grpc-status"] == str(grpc.StatusCode.UNIMPLEMENTED.value[0])
