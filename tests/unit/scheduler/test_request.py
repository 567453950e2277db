from __future__ import annotations

import struct

import pytest
from google.api import httpbody_pb2

from tidegate.common import headers
from tidegate.scheduler.bodies import body_kind, message_of
from tidegate.scheduler.request import ServiceClass, parse_grpc_timeout, request_from_headers
from tidegate.v1 import preprocess_pb2

JSON_FIELDS = {":path": "/v1/chat/completions", "content-type": "application/json; charset=utf-8"}
GRPC_FIELDS = {":path": "/tidegate.v1.Inference/Generate", "content-type": "application/grpc"}


def frame(message, *, compressed=0, length=None):
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5S", 5), ("200m", 0.2), ("1H", 3600), ("2M", 120), ("7u", 7e-6), ("9n", 9e-9), ("99999999m", 99999.999)],
)
def test_a_grpc_timeout_is_read_in_its_unit(text, seconds):
    assert parse_grpc_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "S", "-5S", "5s", "123456789S", "1.5S", " 5S", "5S "])
def test_what_is_no_grpc_timeout_is_none(text):
    assert parse_grpc_timeout(text) is None


def test_a_request_is_what_its_headers_say():
    fields = {
        **JSON_FIELDS,
        ":path": "/v1/chat/completions?x=1",
        headers.REQUEST_ID: "id",
        headers.TENANT: "acme",
        headers.SERVICE_CLASS: "realtime",
        "grpc-timeout": "10S",
    }
    request = request_from_headers(fields, now=100)
    assert (request.request_id, request.tenant, request.path) == ("id", "acme", "/v1/chat/completions")
    assert request.named_class is ServiceClass.REALTIME
    assert request.content_type == "application/json"
    assert request.deadline == request.client_deadline == pytest.approx(109.98)


def test_a_request_that_says_little_has_the_defaults():
    request = request_from_headers({":path": "/"}, now=100)
    assert (request.tenant, request.deadline, request.named_class) == (headers.DEFAULT_TENANT, None, None)


@pytest.mark.parametrize(
    ("path", "content_type", "kind"),
    [
        ("/v1/chat/completions", "application/json", preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS),
        ("/v1/completions", "application/json", preprocess_pb2.BODY_KIND_COMPLETIONS),
        ("/tidegate.v1.Inference/Generate", "application/grpc+proto", preprocess_pb2.BODY_KIND_GENERATE),
        ("/tidegate.v1.Inference/ChatCompletions", "application/grpc", preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS),
        ("/tidegate.v1.Inference/Completions", "application/grpc-web", preprocess_pb2.BODY_KIND_COMPLETIONS),
        ("/tidegate.v1.Inference/GenerateMany", "application/grpc", None),
        ("/tidegate.v1.Inference/Generate", "application/json", None),
        ("/tidegate.v1.Inference/Generate", "application/grpc-web-text", None),
        ("/v1/models", "application/json", None),
    ],
)
def test_the_kind_of_a_body_follows_from_path_and_content_type(path, content_type, kind):
    assert body_kind(request_from_headers({":path": path, "content-type": content_type}, 0)) == kind


def test_an_encoded_body_is_not_read():
    assert body_kind(request_from_headers({**JSON_FIELDS, "content-encoding": "gzip"}, 0)) is None
    assert body_kind(request_from_headers({**JSON_FIELDS, "content-encoding": "identity"}, 0)) is not None


def test_a_json_body_is_taken_as_it_is():
    assert message_of(request_from_headers(JSON_FIELDS, 0), b"{}") == b"{}"


def test_a_grpc_body_is_taken_out_of_its_frame():
    assert message_of(request_from_headers(GRPC_FIELDS, 0), frame(b"abc")) == b"abc"
    assert message_of(request_from_headers(GRPC_FIELDS, 0), frame(b"")) == b""


def test_an_http_body_over_grpc_is_taken_out_of_its_message():
    fields = {**GRPC_FIELDS, ":path": "/tidegate.v1.Inference/ChatCompletions"}
    body = httpbody_pb2.HttpBody(content_type="application/json", data=b'{"a":1}').SerializeToString()
    assert message_of(request_from_headers(fields, 0), frame(body)) == b'{"a":1}'
    assert message_of(request_from_headers(fields, 0), frame(b"\xff\xff\xff")) is None


@pytest.mark.parametrize(
    "body",
    [b"", b"\0\0\0", frame(b"abc", compressed=1), frame(b"abc", length=2), frame(b"abc", length=9), frame(b"a") * 2],
)
def test_what_is_not_one_plain_grpc_message_is_left_to_the_model_service(body):
    assert message_of(request_from_headers(GRPC_FIELDS, 0), body) is None
