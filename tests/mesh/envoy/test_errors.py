"""What clients are told when something is wrong, whoever says it: a service, the scheduler or Envoy."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
from urllib.parse import unquote

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from tidegate.common.errors import SURFACES, Reason, TidegateError, openai_body, retry_headers
from tidegate.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
GENERATE = "/tidegate.v1.Inference/Generate"
TOO_LARGE = 4 * 1024 * 1024 + 1


def check_openai_error(response: httpx.Response, reason: Reason, status: int | None = None) -> dict[str, str | None]:
    """The response is the one error object for this reason, and says nothing else of the inside."""
    surface = SURFACES[reason]
    assert response.status_code == (status or surface.http_status), response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (surface.openai_type, reason.name.lower())
    assert response.headers["x-tidegate-reason"] == reason.name
    assert response.headers["x-request-id"]
    assert surface.retryable or response.headers["x-should-retry"] == "false"
    assert ("retry-after" in response.headers) == surface.retryable
    inside = {"x-tidegate-error", "x-tidegate-http-status", "grpc-status", "grpc-message", "grpc-status-details-bin"}
    assert not inside & set(response.headers)
    return error


async def grpc_error(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


def check_grpc_error(error: grpc.aio.AioRpcError, reason: Reason) -> dict[str, str | bytes]:
    """The status, its details and its metadata are those of the reason."""
    assert error.code() == SURFACES[reason].grpc_status
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason.name, "tidegate")
    has_retry_info = any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
    assert has_retry_info == SURFACES[reason].retryable
    assert metadata["x-tidegate-reason"] == reason.name
    assert "x-tidegate-error" not in metadata
    assert metadata["x-request-id"]
    return metadata


def refuse(reason: Reason) -> str:
    retry = 2.5 if SURFACES[reason].retryable else None
    return json.dumps(
        {"do": "refuse", "reason": reason.name, "field": "messages[0].role", "retry_after_seconds": retry}
    )


@pytest.mark.parametrize("reason", Reason)
async def test_an_error_of_a_service_has_its_status_and_body_over_http(mesh, client, reason):
    error = check_openai_error(await client.post(CHAT, json={"prompt": refuse(reason)}), reason)
    assert (error["message"], error["param"]) == ("No: größer als „100“.", "messages[0].role")


@pytest.mark.parametrize("reason", Reason)
async def test_an_error_of_a_service_keeps_its_details_over_grpc(mesh, stub, reason):
    error = await grpc_error(stub.Generate(inference_pb2.GenerateRequest(text=refuse(reason))))
    metadata = check_grpc_error(error, reason)
    assert error.details() == "No: größer als „100“."
    assert metadata["grpc-retry-pushback-ms"] == ("2500" if SURFACES[reason].retryable else "-1")


async def grpc_web(client, message, *, is_text=False) -> httpx.Response:
    data = message.SerializeToString()
    frame = struct.pack(">BI", 0, len(data)) + data
    kind = "application/grpc-web-text+proto" if is_text else "application/grpc-web+proto"
    content = base64.b64encode(frame) if is_text else frame
    return await client.post(GENERATE, content=content, headers={"content-type": kind, "accept": kind})


def check_grpc_web_error(response: httpx.Response, reason: Reason) -> None:
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == response.request.headers["content-type"]
    assert response.headers["grpc-status"] == str(SURFACES[reason].grpc_status.value[0])
    assert response.headers["x-tidegate-reason"] == reason.name
    assert response.headers["grpc-status-details-bin"]
    assert "x-tidegate-error" not in response.headers


async def test_an_error_of_a_service_over_grpc_web(mesh, client):
    request = inference_pb2.GenerateRequest(text=refuse(Reason.MODEL_NOT_FOUND))
    check_grpc_web_error(await grpc_web(client, request), Reason.MODEL_NOT_FOUND)


async def test_retry_times_stand_in_all_forms(mesh, client):
    response = await client.post(CHAT, json={"prompt": refuse(Reason.SERVER_IS_OVERLOADED)})
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")


async def test_a_fault_of_a_service_is_an_internal_error_without_its_text(mesh, client):
    response = await client.post(CHAT, json={"prompt": '{"do": "crash"}'})
    check_openai_error(response, Reason.INTERNAL_ERROR)
    assert "RuntimeError" not in response.text
    assert not [name for name in response.headers if name.startswith("grpc-")]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("UNAVAILABLE", Reason.REPLICA_UNAVAILABLE),
        ("INTERNAL", Reason.INTERNAL_ERROR),
        ("UNIMPLEMENTED", Reason.INTERNAL_ERROR),
    ],
)
async def test_a_status_without_a_reason_gets_what_the_table_says(mesh, client, status, reason):
    response = await client.post(CHAT, json={"prompt": json.dumps({"do": "end", "status": status})})
    error = check_openai_error(response, reason)
    assert "without a reason" not in str(error["message"])
    told = TidegateError(reason, "", retry_after_seconds=1)
    expected = {name: value for name, value in retry_headers(told) if not name.startswith("grpc-")}
    names = {"retry-after", "retry-after-ms", "x-should-retry"}
    assert {name: value for name, value in response.headers.items() if name in names} == expected


@pytest.mark.parametrize("phase", ["headers", "body"])
@pytest.mark.parametrize("reason", [Reason.SERVER_IS_OVERLOADED, Reason.CONTEXT_LENGTH_EXCEEDED])
async def test_a_refusal_of_the_scheduler_reaches_clients_as_it_was_meant(mesh, client, stub, phase, reason):
    retry = 2.5 if SURFACES[reason].retryable else None
    error = TidegateError(reason, "Not now: größer.", field="model", retry_after_seconds=retry)
    setattr(mesh.scheduler, f"refuse_on_{phase}", error)
    response = await client.post(CHAT, json={"prompt": "hello"})
    check_openai_error(response, reason)
    assert response.json() == openai_body(error)
    caught = await grpc_error(stub.Generate(inference_pb2.GenerateRequest(text="hello")))
    metadata = check_grpc_error(caught, reason)
    assert metadata["grpc-retry-pushback-ms"] == ("2500" if retry else "-1")
    for is_text in (False, True):
        web = await grpc_web(client, inference_pb2.GenerateRequest(text="hello"), is_text=is_text)
        check_grpc_web_error(web, reason)
        assert unquote(web.headers["grpc-message"]) == "Not now: größer."
    assert [replica.inference.seen for replica in mesh.replicas] == [[], []]


async def test_a_refusal_by_a_brownout_names_its_step_on_every_surface(mesh, client, stub):
    mesh.scheduler.refuse_on_headers = TidegateError(
        Reason.SERVER_IS_OVERLOADED, "Not now.", retry_after_seconds=2.5, brownout_step=5
    )
    response = await client.post(CHAT, json={"prompt": "hello"})
    check_openai_error(response, Reason.SERVER_IS_OVERLOADED)
    assert response.headers["x-tidegate-brownout"] == "5"
    caught = await grpc_error(stub.Generate(inference_pb2.GenerateRequest(text="hello")))
    assert check_grpc_error(caught, Reason.SERVER_IS_OVERLOADED)["x-tidegate-brownout"] == "5"
    for is_text in (False, True):
        web = await grpc_web(client, inference_pb2.GenerateRequest(text="hello"), is_text=is_text)
        assert web.headers["x-tidegate-brownout"] == "5"


async def test_unknown_urls(mesh, client):
    for method, path in (("GET", "/"), ("POST", "/v1/embeddings"), ("GET", "/v1/chat"), ("POST", "/v2/models")):
        check_openai_error(await client.request(method, path), Reason.UNKNOWN_URL)


async def test_wrong_methods_name_the_right_one(mesh, client):
    for method, path, allowed in (
        ("GET", CHAT, "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/m", "GET"),
    ):
        response = await client.request(method, path)
        check_openai_error(response, Reason.METHOD_NOT_ALLOWED)
        assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/grpc"},
    ],
)
async def test_bodies_that_are_not_json_are_refused_before_anybody_reads_them(mesh, client, headers):
    response = await client.post(CHAT, content=b"{}", headers=headers)
    if headers.get("content-type") == "application/grpc":
        assert response.headers["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
    else:
        check_openai_error(response, Reason.UNSUPPORTED_MEDIA_TYPE)
    assert mesh.scheduler.seen == []


@pytest.mark.parametrize("byte_count", [TOO_LARGE, 10_000_000])
async def test_a_body_that_is_too_large_is_413_for_a_client_that_sends_before_it_reads(mesh, client, byte_count):
    response = await client.post(CHAT, content=b"x" * byte_count, headers={"content-type": "application/json"})
    error = check_openai_error(response, Reason.REQUEST_TOO_LARGE)
    assert str(4 * 1024 * 1024) in str(error["message"])
    assert mesh.scheduler.seen == []


async def test_the_largest_body_passes(mesh, client):
    content = b'{"prompt": "' + b"x" * (4 * 1024 * 1024 - 14) + b'"}'
    assert len(content) == 4 * 1024 * 1024
    response = await client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text


async def raw(mesh, data: bytes) -> httpx.Response:
    """Sends bytes as they are and reads one response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", mesh.settings.ingress_port)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    finally:
        writer.close()
    return httpx.Response(int(head[0].split()[1]), headers=headers, content=body)


async def test_a_body_without_length_is_bounded_too(mesh):
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = f"{TOO_LARGE:x}\r\n".encode() + b"x" * TOO_LARGE
    check_openai_error(await raw(mesh, head.encode() + chunk), Reason.REQUEST_TOO_LARGE)


async def test_a_body_past_what_is_worth_reading_is_refused_at_once(mesh):
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n"
    check_openai_error(await raw(mesh, head.encode()), Reason.REQUEST_TOO_LARGE)


@pytest.mark.parametrize(
    "data",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET /v1/models/%zz%00 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
async def test_malformed_http_is_told_so(mesh, data):
    response = await raw(mesh, data)
    assert response.status_code in {400, 404, 426}, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 36


async def test_headers_that_are_too_large(mesh, client):
    response = await client.get("/v1/models", headers={"x-large": "x" * 100_000})
    assert response.status_code == 431
    assert response.json()["error"]["code"] == "request_too_large"


async def test_no_replica_at_all(mesh, client, stub):
    mesh.endpoints("model")
    await mesh.wait_healthy("model", 0)
    try:
        response = await client.post(CHAT, json={"prompt": "hello"})
        check_openai_error(response, Reason.REPLICA_UNAVAILABLE)
        assert response.headers["retry-after"] == "1"
        error = await grpc_error(stub.Generate(inference_pb2.GenerateRequest(text="hello")))
        check_grpc_error(error, Reason.REPLICA_UNAVAILABLE)
        for is_text in (False, True):
            web = await grpc_web(client, inference_pb2.GenerateRequest(text="hello"), is_text=is_text)
            check_grpc_web_error(web, Reason.REPLICA_UNAVAILABLE)
        models = await client.get("/v1/models")
        check_openai_error(models, Reason.REPLICA_UNAVAILABLE)
    finally:
        mesh.endpoints("model", *mesh.replicas)
        await mesh.wait_healthy("model", 2)


async def test_grpc_clients_get_grpc_errors_from_envoy(mesh):
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        unknown = channel.unary_unary("/no.such.Service/Method")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown(b"")
        check_grpc_error(caught.value, Reason.UNKNOWN_URL)
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(text="x" * TOO_LARGE))
        error = await grpc_error(call)
        check_grpc_error(error, Reason.REQUEST_TOO_LARGE)


async def test_what_never_reached_a_service_is_logged_and_nothing_else(mesh, client):
    secret = "not-for-the-log"
    served = await client.post(CHAT, json={"prompt": "hello"})
    invalid = await client.post(CHAT, json={"prompt": refuse(Reason.INVALID_VALUE)})
    mesh.scheduler.refuse_on_headers = TidegateError(Reason.SERVER_IS_OVERLOADED, "full", retry_after_seconds=1)
    refused = await client.post(CHAT, json={"prompt": "hello"})
    lost = await client.get(f"/nowhere?key={secret}", headers={"authorization": secret})
    expected, *others = [response.headers["x-request-id"] for response in (lost, served, invalid, refused)]
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        error = await grpc_error(channel.unary_stream("/no.such.Service/Method")(b""))
    expected_grpc = dict(error.trailing_metadata() or ())["x-request-id"]
    async with asyncio.timeout(5):
        while not (entries := [e for e in mesh.access_log() if e["request_id"] in (expected, expected_grpc)][1:]):
            await asyncio.sleep(0.05)
    entries = [entry for entry in mesh.access_log() if entry["request_id"] == expected]
    assert [(entry["path"], entry["status"], entry["tenant"]) for entry in entries] == [("/nowhere", 404, "default")]
    assert not [entry for entry in mesh.access_log() if entry["request_id"] in others]
    assert secret not in str(mesh.access_log())
