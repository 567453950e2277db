"""OpenAI's endpoints over the one path of an answer: an HTTP body in, HTTP bodies out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Final

from google.api import httpbody_pb2

from tidegate.openai.request import OpenAIRequest
from tidegate.openai.response import ResponseFormatter
from tidegate.v1 import inference_pb2

EVENT_STREAM: Final = "text/event-stream"
JSON: Final = "application/json"

OPERATIONS: Final = {"chat": "chat", "completion": "text_completion"}
"""OpenTelemetry's names of the two."""


async def bodies(
    request: OpenAIRequest,
    events: AsyncGenerator[inference_pb2.GenerateEvent, None],
    request_id: str,
    unix_seconds: Callable[[], float],
) -> AsyncGenerator[httpbody_pb2.HttpBody, None]:
    """The answer as it goes to an HTTP client: server-sent events, or one JSON object at the end.

    Raises:
        TidegateError: it failed before the first byte.
    """
    formatter = ResponseFormatter(request, request_id, int(unix_seconds()))
    if not request.stream:
        yield httpbody_pb2.HttpBody(content_type=JSON, data=formatter.complete([event async for event in events]))
        return
    # Only the first message of a stream names the type.
    content_type = EVENT_STREAM
    async for event in events:
        data = formatter.event(event)
        if data:
            yield httpbody_pb2.HttpBody(content_type=content_type, data=data)
            content_type = ""
