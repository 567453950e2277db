"""What a status and an error are on each surface that a stream can have. Pure: bytes in, bytes out.

The messages of the answer itself are never looked into: they pass as the bytes that they are.
"""

from __future__ import annotations

from typing import Final, Protocol

from google.api import httpbody_pb2

from tidegate.common.errors import TidegateError, openai_json, to_status
from tidegate.openai.request import OpenAIRequest
from tidegate.openai.response import ResponseFormatter
from tidegate.v1 import inference_pb2, scheduler_pb2

EVENT_STREAM: Final = "text/event-stream"


class Surface(Protocol):
    """How one stream speaks.

    Attributes:
        ends_with_status: whether a stream that breaks can still say so after its messages.
        opening: the headers of a response that is opened before the answer's own are known.
    """

    ends_with_status: bool
    opening: tuple[tuple[str, str], ...]

    def queued(self, status: scheduler_pb2.QueueStatus) -> bytes:
        """The message that tells the place."""

    def error(self, error: TidegateError) -> bytes:
        """The last message of a stream whose status is spent."""


class TypedEvents:
    """GenerateEvent.

    Args:
        request_id: which the events carry.
    """

    ends_with_status = True
    opening: tuple[tuple[str, str], ...] = ()

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def queued(self, status: scheduler_pb2.QueueStatus) -> bytes:
        """A `queued` event."""
        queued = inference_pb2.Queued(position=status.position)
        if status.HasField("expected_wait"):
            queued.expected_wait.CopyFrom(status.expected_wait)
        return inference_pb2.GenerateEvent(request_id=self._request_id, queued=queued).SerializeToString()

    def error(self, error: TidegateError) -> bytes:
        """A `finished` event with the error."""
        finished = inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_ERROR, error=to_status(error))
        return inference_pb2.GenerateEvent(request_id=self._request_id, finished=finished).SerializeToString()


class ServerSentEvents:
    """OpenAI's streams, as HttpBody.

    Args:
        request: as it was parsed; None where it could not be, and then an error is the bare error object.
        request_id: the mesh's id.
        created_unix_seconds: when the stream began.
    """

    ends_with_status = False
    opening: tuple[tuple[str, str], ...] = (("cache-control", "no-cache"),)

    def __init__(self, request: OpenAIRequest | None, request_id: str, created_unix_seconds: int) -> None:
        self._request = request
        self._request_id = request_id
        self._created = created_unix_seconds

    def queued(self, status: scheduler_pb2.QueueStatus) -> bytes:
        """A comment line, which clients that know nothing of it skip."""
        words = f": queued position={status.position}"
        if status.HasField("expected_wait"):
            words += f" eta_ms={status.expected_wait.ToMilliseconds()}"
        return _body(f"{words}\n\n".encode())

    def error(self, error: TidegateError) -> bytes:
        """What the model service would write: a chunk with finish_reason `error`, then the error object."""
        if self._request is None:
            return _body(f"data: {openai_json(error)}\n\n".encode())
        return _body(ResponseFormatter(self._request, self._request_id, self._created).error(error))


def _body(data: bytes) -> bytes:
    return bytes(httpbody_pb2.HttpBody(content_type=EVENT_STREAM, data=data).SerializeToString())
