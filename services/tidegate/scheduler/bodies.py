"""What a request's body is, by its path and content type: the one place that knows the two ways in. Pure."""

from __future__ import annotations

import struct
from typing import Final

from google.api import httpbody_pb2
from google.protobuf.message import DecodeError

from tidegate.scheduler.request import Request
from tidegate.v1 import preprocess_pb2

_JSON_KINDS: Final = {
    "/v1/chat/completions": preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS,
    "/v1/completions": preprocess_pb2.BODY_KIND_COMPLETIONS,
}
_GRPC_KINDS: Final = {
    "/tidegate.v1.Inference/Generate": preprocess_pb2.BODY_KIND_GENERATE,
    "/tidegate.v1.Inference/ChatCompletions": preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS,
    "/tidegate.v1.Inference/Completions": preprocess_pb2.BODY_KIND_COMPLETIONS,
}
_FRAME_HEADER: Final = struct.Struct(">BI")
"""gRPC's: whether the message is compressed, and its length in bytes."""

_REQUEST_ID_TAG: Final = 0x0A
"""Field 1, length-delimited."""

LONGEST_SHORT_LENGTH: Final = 0x7F
"""A length that takes one byte. The service refuses an id of more than 128 characters."""


def body_kind(request: Request) -> preprocess_pb2.BodyKind.ValueType | None:
    """What the body is; None where it is not for the scheduler to read: another path, compressed, base64."""
    if request.is_encoded or request.content_type.startswith("application/grpc-web-text"):
        return None
    kinds = _GRPC_KINDS if request.is_grpc else _JSON_KINDS
    return kinds.get(request.path)


def client_request_id(kind: preprocess_pb2.BodyKind.ValueType, message: bytes) -> str:
    """The request_id of a GenerateRequest; empty for none, and for any other body.

    It is the message's first field, and every known implementation writes fields in their order, so a look at the
    beginning is enough: a long prompt need not be decoded for it.
    """
    if kind != preprocess_pb2.BODY_KIND_GENERATE or len(message) < 2 or message[0] != _REQUEST_ID_TAG:
        return ""
    byte_count = message[1]
    if byte_count > LONGEST_SHORT_LENGTH:
        return ""
    return message[2 : 2 + byte_count].decode("utf-8", "replace")


def message_of(request: Request, body: bytes) -> bytes | None:
    """The JSON or the GenerateRequest in a body; None for a body that is not one whole plain gRPC message.

    What is None here is left to the model service, whose gRPC says exactly what is wrong with it.
    """
    if not request.is_grpc:
        return body
    if len(body) < _FRAME_HEADER.size:
        return None
    is_compressed, byte_count = _FRAME_HEADER.unpack_from(body)
    message = body[_FRAME_HEADER.size :]
    if is_compressed or byte_count != len(message):
        return None
    if body_kind(request) == preprocess_pb2.BODY_KIND_GENERATE:
        return message
    try:
        return bytes(httpbody_pb2.HttpBody.FromString(message).data)
    except DecodeError:
        return None
