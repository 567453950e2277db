"""The typed messages over gRPC-Web: Envoy's own dialect of gRPC for HTTP/1.1, a fifth of grpc.aio's CPU time a token.

Source of the form: grpc/grpc, doc/PROTOCOL-WEB.md. Each frame has one byte of flags, four of length, and the content:
a message, or (flag 0x80) the trailers as lines of an HTTP head. A refusal may have its status in the response's head.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import unquote

import httptools
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from tidegate.bench.clients import http1, messages
from tidegate.bench.clients.answer import CLASS_HEADER, Answer, Ask
from tidegate.bench.ledger import Ending
from tidegate.bench.targets import Target
from tidegate.client import failure_of_status

_HEAD_BYTES: Final = 5
_TRAILERS: Final = 0x80
_DEADLINE_EXCEEDED: Final = "4"
_RESOURCE_EXHAUSTED: Final = "8"


class GrpcWebClient:
    """tidegate.v1.Inference/Generate, for targets behind Envoy.

    Args:
        clock: what the answers' times are taken from.
    """

    wants_text = False

    def __init__(self, target: Target, clock: Callable[[], float]) -> None:
        self._target = target
        self._clock = clock
        base = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", "accept-encoding": "identity"}
        self._headers = {tenant: base | {"authorization": f"Bearer {key}"} for tenant, key in target.api_keys.items()}
        self._base_headers = base
        self._connections = http1.Connections(target.address)

    async def start(self) -> None:
        """Opens the first connection."""
        await self._connections.start()

    async def ask(self, ask: Ask, answer: Answer) -> None:
        """One stream to its end."""
        message = messages.encoded(ask, self._target.model)
        headers = self._headers.get(ask.tenant, self._base_headers) | {
            "grpc-timeout": f"{max(1, int(ask.timeout_seconds * 1000))}m",
            CLASS_HEADER: ask.service_class,
        }
        body = b"\0" + len(message).to_bytes(4, "big") + message
        try:
            await self._connections.post(messages.METHOD, headers, body, _Stream(answer, self._clock))
        except (httptools.HttpParserError, OSError, DecodeError) as error:
            answer.fail(f"{type(error).__name__}: {error}")
        if answer.ending is None:
            answer.fail("the stream ended without its last event")

    async def close(self) -> None:
        """Ends all connections."""
        self._connections.close()


class _Stream:
    """Takes a response apart, frame by frame."""

    def __init__(self, answer: Answer, clock: Callable[[], float]) -> None:
        self._answer = answer
        self._clock = clock
        self._rest = b""
        self._has_frames = False

    def head(self, status: int, headers: http1.Headers) -> None:
        """Where it is refused at once, that is all."""
        self._answer.request_id = headers.get("x-request-id", "")
        if "grpc-status" in headers:
            note_trailers(headers, self._answer)
        elif status != 200:
            self._answer.fail(f"HTTP {status}")
        else:
            self._has_frames = True

    def content(self, chunk: bytes) -> None:
        """Notes the frames that are whole."""
        if not self._has_frames:
            return
        rest = self._rest + chunk if self._rest else chunk
        begin = 0
        while len(rest) - begin >= _HEAD_BYTES:
            end = begin + _HEAD_BYTES + int.from_bytes(rest[begin + 1 : begin + _HEAD_BYTES], "big")
            if len(rest) < end:
                break
            content = rest[begin + _HEAD_BYTES : end]
            if rest[begin] & _TRAILERS:
                note_trailers(_lines(content), self._answer)
            else:
                messages.note(content, self._answer, self._clock)
            begin = end
        self._rest = rest[begin:]


def note_trailers(trailers: Mapping[str, str], answer: Answer) -> None:
    """Notes the status at a stream's end."""
    code = trailers.get("grpc-status", "0")
    if code == "0":
        return
    text = unquote(trailers.get("grpc-message", ""))
    details = trailers.get("grpc-status-details-bin", "")
    status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    failure = failure_of_status(status)
    if failure.reason:
        answer.refuse(failure.reason, failure.retry_after_seconds, text)
    elif code == _DEADLINE_EXCEEDED:
        answer.ending = Ending.DEADLINE_EXCEEDED
    elif code == _RESOURCE_EXHAUSTED:
        answer.refuse("RESOURCE_EXHAUSTED", http1.retry_after_seconds(trailers), text)
    else:
        answer.fail(f"gRPC status {code}: {text}")


def _lines(content: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in content.decode("latin-1").split("\r\n") if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
