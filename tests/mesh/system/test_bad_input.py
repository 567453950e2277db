"""Everything that a client can get wrong, on both surfaces of the real mesh: a typed refusal, never a 500 or a hang."""

from __future__ import annotations

import json
import socket
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MODEL = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> bytes:
    """A good chat body with some fields changed; a field that is `...` is left out."""
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4} | fields
    return json.dumps({name: value for name, value in body.items() if value is not ...}).encode()


BAD_BODIES = [
    # name, path, body, status, code, param
    ("empty body", CHAT, b"", 400, "invalid_json", None),
    ("not json", CHAT, b"{model: x}", 400, "invalid_json", None),
    ("cut json", CHAT, chat()[:-10], 400, "invalid_json", None),
    ("a list", CHAT, b"[]", 400, "invalid_type", None),
    ("a number", CHAT, b"7", 400, "invalid_type", None),
    ("broken UTF-8", CHAT, b'{"model":"' + MODEL.encode() + b'","messages":[{"role":"user","content":"\xff\xfe"}]}',
     400, "invalid_json", None),
    ("lone surrogate", CHAT, chat(messages=[{"role": "user", "content": "\ud800"}]), 400, "invalid_value",
     "messages[0].content"),
    ("a depth bomb", CHAT, b"[" * 100_000, 400, "invalid_json", None),
    ("unknown model", CHAT, chat(model="gpt-9"), 404, "model_not_found", "model"),
    ("model of a wrong type", CHAT, chat(model=7), 400, "invalid_type", "model"),
    ("no messages", CHAT, chat(messages=...), 400, "missing_required_parameter", "messages"),
    ("empty messages", CHAT, chat(messages=[]), 400, "invalid_value", "messages"),
    ("messages of a wrong type", CHAT, chat(messages="hello"), 400, "invalid_type", "messages"),
    ("a message of a wrong type", CHAT, chat(messages=["hello"]), 400, "invalid_type", "messages[0]"),
    ("unknown role", CHAT, chat(messages=[{"role": "wizard", "content": "x"}]), 400, "invalid_value",
     "messages[0].role"),
    ("no role", CHAT, chat(messages=[{"content": "x"}]), 400, "missing_required_parameter", "messages[0].role"),
    ("temperature of a wrong type", CHAT, chat(temperature="hot"), 400, "invalid_type", "temperature"),
    ("temperature too high", CHAT, chat(temperature=2.5), 400, "invalid_value", "temperature"),
    ("temperature below zero", CHAT, chat(temperature=-1), 400, "invalid_value", "temperature"),
    ("temperature NaN", CHAT, chat(temperature=float("nan")), 400, "invalid_json", None),
    ("top_p zero", CHAT, chat(top_p=0), 400, "invalid_value", "top_p"),
    ("max_tokens zero", CHAT, chat(max_tokens=0), 400, "invalid_value", "max_tokens"),
    ("max_tokens below zero", CHAT, chat(max_tokens=-5), 400, "invalid_value", "max_tokens"),
    ("max_tokens as text", CHAT, chat(max_tokens="5"), 400, "invalid_type", "max_tokens"),
    ("n of two", CHAT, chat(n=2), 400, "unsupported_parameter", "n"),
    ("tools", CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "unsupported_parameter",
     "tools"),
    ("a field nobody knows", CHAT, chat(temprature=1), 400, "unknown_parameter", "temprature"),
    ("stop too long a list", CHAT, chat(stop=["a", "b", "c", "d", "e"]), 400, "invalid_value", "stop"),
    ("prompt missing", TEXT, json.dumps({"model": MODEL}).encode(), 400, "missing_required_parameter", "prompt"),
    ("prompt token of a wrong type", TEXT, json.dumps({"model": MODEL, "prompt": [1, "a"]}).encode(), 400,
     "invalid_type", "prompt[1]"),
    ("prompt token outside the vocabulary", TEXT, json.dumps({"model": MODEL, "prompt": [10**9]}).encode(), 400,
     "invalid_value", "prompt[0]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def http(mesh: Any) -> Any:
    """A plain HTTP client of the ingress."""
    with httpx.Client(
        base_url=f"http://{mesh.ingress}", timeout=30, headers={"content-type": "application/json"}
    ) as client:
        yield client


def assert_openai_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The response is an OpenAI error object with all four keys, and what goes with every response."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
    assert not [name for name in response.headers if name in ("x-tidegate-error", "grpc-status", "grpc-message")]
    return dict(error)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"), [row[1:] for row in BAD_BODIES], ids=[row[0] for row in BAD_BODIES]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_bad_body_is_refused_by_name(
    http: httpx.Client, path: str, body: bytes, status: int, code: str, param: str | None, stream: bool
) -> None:
    if stream and body.endswith(b"}") and b'"model"' in body:
        body = body[:-1] + b', "stream": true}'
    response = http.post(path, content=body)
    error = assert_openai_error(response, status, code, param)
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-should-retry"] == "false"


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(http: httpx.Client) -> None:
    response = http.post(CHAT, content=chat(messages=[{"role": "user", "content": "word " * 20_000}]))
    error = assert_openai_error(response, 400, "context_length_exceeded", "messages")
    assert "8192" in error["message"] and "200" in error["message"]


def test_a_ten_megabyte_prompt_is_refused_as_too_large(http: httpx.Client) -> None:
    response = http.post(CHAT, content=chat(messages=[{"role": "user", "content": "x" * 10_000_000}]))
    assert_openai_error(response, 413, "request_too_large")


def test_a_body_that_is_not_called_json_is_refused(http: httpx.Client) -> None:
    response = http.post(CHAT, content=chat(), headers={"content-type": "text/plain"})
    assert_openai_error(response, 415, "unsupported_media_type")


def test_an_unknown_url_and_a_wrong_method_are_said_so(http: httpx.Client) -> None:
    assert_openai_error(http.get("/v2/nothing"), 404, "unknown_url")
    assert_openai_error(http.get(CHAT), 405, "method_not_allowed")


def test_a_body_cut_in_the_middle_leaves_the_mesh_alone(mesh: Any, http: httpx.Client) -> None:
    host, _, port = mesh.ingress.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: mesh\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
        connection.sendall(head.encode() + chat()[:40])
    assert http.post(CHAT, content=chat()).status_code == 200


def test_headers_that_pretend_to_be_internal_are_ignored(http: httpx.Client) -> None:
    pretence = {
        "x-tidegate-replica": "127.0.0.1:1",
        "x-tidegate-route": "cache",
        "x-tidegate-answer-key": "00" * 32,
        "x-tidegate-tenant": "somebody-else",
        "x-tidegate-tensor": "AAAA",
        "x-tidegate-credit": "forged",
        "x-tidegate-timeout-ms": "1",
    }
    response = http.post(CHAT, content=chat(), headers=pretence)
    assert response.status_code == 200, response.text
    assert "x-tidegate-cache" not in response.headers


BAD_MESSAGES = [
    ("nothing set", pb.GenerateRequest(), "MISSING_REQUIRED_PARAMETER", "prompt"),
    ("empty chat", pb.GenerateRequest(chat=pb.Chat()), "INVALID_VALUE", "chat.messages"),
    ("no role", pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="x")])),
     "INVALID_VALUE", "chat.messages[0].role"),
    ("unknown role", pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="wizard", content="x")])),
     "INVALID_VALUE", "chat.messages[0].role"),
    ("unknown model", pb.GenerateRequest(text="x", model="gpt-9"), "MODEL_NOT_FOUND", "model"),
    ("max_tokens zero", pb.GenerateRequest(text="x", max_tokens=0), "INVALID_VALUE", "max_tokens"),
    ("temperature NaN", pb.GenerateRequest(text="x", sampling=pb.SamplingParameters(temperature=float("nan"))),
     "INVALID_VALUE", "sampling.temperature"),
    ("top_p below zero", pb.GenerateRequest(text="x", sampling=pb.SamplingParameters(top_p=-1)), "INVALID_VALUE",
     "sampling.top_p"),
    ("an empty stop", pb.GenerateRequest(text="x", stop=[""]), "INVALID_VALUE", "stop[0]"),
    ("a token outside the vocabulary", pb.GenerateRequest(tokens=pb.TokenIds(token_ids=[1, -4])), "INVALID_VALUE",
     "tokens.token_ids[1]"),
    ("too many logprobs", pb.GenerateRequest(text="x", logprobs=21), "INVALID_VALUE", "logprobs"),
    ("a class that does not exist", pb.GenerateRequest(text="x", service_class=9), "INVALID_VALUE", "service_class"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "reason", "field"), [row[1:] for row in BAD_MESSAGES], ids=[row[0] for row in BAD_MESSAGES]
)
def test_a_bad_message_is_refused_by_name(mesh: Any, message: pb.GenerateRequest, reason: str, field: str) -> None:
    with grpc.insecure_channel(mesh.ingress) as channel, pytest.raises(grpc.RpcError) as raised:
        list(inference_pb2_grpc.InferenceStub(channel).Generate(message, timeout=30))
    error: Any = raised.value
    expected = grpc.StatusCode.NOT_FOUND if reason == "MODEL_NOT_FOUND" else grpc.StatusCode.INVALID_ARGUMENT
    assert error.code() is expected, error
    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info) and info.reason == reason
    assert status.details[1].Unpack(bad) and bad.field_violations[0].field == field


def test_bytes_that_are_no_message_are_refused(mesh: Any) -> None:
    with grpc.insecure_channel(mesh.ingress) as channel, pytest.raises(grpc.RpcError) as raised:
        call = channel.unary_stream("/tidegate.v1.Inference/Generate", request_serializer=bytes)
        list(call(b"\xff\xff\xff\xff", timeout=30))
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error


def test_after_all_that_the_mesh_still_answers(http: httpx.Client) -> None:
    assert http.post(CHAT, content=chat()).json()["choices"][0]["finish_reason"] in ("stop", "length")
