"""tidegate.v1.Inference of the cache: tells a stored answer again, on every surface that the model has.

Envoy sends a request here when the scheduler's look-up found its answer. Until the first message nothing is
promised: an answer that is gone by now is UNAVAILABLE, and Envoy goes on to the next priority of the cluster,
which are the model's replicas.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc
import structlog
from google.api import httpbody_pb2

from tidegate.cache.answers import answer_id, replay_events
from tidegate.cache.metrics import CacheMetrics
from tidegate.cache.tiers import Tiers
from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions
from tidegate.openai.response import ResponseFormatter
from tidegate.v1 import cache_pb2, inference_pb2, inference_pb2_grpc

log = structlog.get_logger()

JSON_CONTENT_TYPE: Final = "application/json"
STREAM_CONTENT_TYPE: Final = "text/event-stream"

Context = grpc.aio.ServicerContext[Any, Any]


class ReplayServicer(inference_pb2_grpc.InferenceServicer):
    """Replays answers from the tiers.

    Args:
        clock: a clock in seconds that does not go back.
        wall_clock: Unix time in seconds, for OpenAI's `created`.
    """

    def __init__(
        self,
        tiers: Tiers,
        metrics: CacheMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tiers = tiers
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        """Replays as typed events."""
        arrived_at = self._clock()
        answer = await self._answer(context)
        request_id = request.request_id or _header(context, headers.REQUEST_ID)
        await context.send_initial_metadata(((headers.CACHED, "hit"),))
        for event in replay_events(answer, request_id, elapsed_seconds=self._clock() - arrived_at):
            yield event
        self._note("replayed", request_id)

    async def ChatCompletions(
        self, request: httpbody_pb2.HttpBody, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Replays as OpenAI's chat completion, JSON or server-sent events."""
        async for part in self._replay_http(request, parse_chat_completions, context):
            yield part

    async def Completions(
        self, request: httpbody_pb2.HttpBody, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Replays as OpenAI's text completion, JSON or server-sent events."""
        async for part in self._replay_http(request, parse_completions, context):
            yield part

    async def Models(self, request: inference_pb2.ModelsRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Refused: the model services know."""
        await abort(context, TidegateError(Reason.UNKNOWN_URL, "the cache replays answers and serves no models"))

    async def GenerateMany(  # type: ignore[override]  # grpc.aio takes a coroutine that writes by itself, too.
        self, request_iterator: AsyncIterator[inference_pb2.GenerateRequest], context: Context
    ) -> None:
        """Refused: each of its prompts comes as a Generate of its own."""
        await abort(context, TidegateError(Reason.UNKNOWN_URL, "the cache replays one answer at a time"))

    async def _replay_http(
        self, request: httpbody_pb2.HttpBody, parse: Callable[[bytes], OpenAIRequest], context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        arrived_at = self._clock()
        try:
            parsed = parse(request.data)
        except TidegateError as error:
            await abort(context, error)
        answer = await self._answer(context)
        request_id = _header(context, headers.REQUEST_ID)
        formatter = ResponseFormatter(parsed, request_id, int(self._wall_clock()))
        events = list(replay_events(answer, request_id, elapsed_seconds=self._clock() - arrived_at))
        await context.send_initial_metadata(((headers.CACHED, "hit"),))
        if parsed.stream:
            for event in events:
                data = formatter.event(event)
                if data:
                    yield httpbody_pb2.HttpBody(content_type=STREAM_CONTENT_TYPE, data=data)
        else:
            yield httpbody_pb2.HttpBody(content_type=JSON_CONTENT_TYPE, data=formatter.complete(events))
        self._note("replayed", request_id)

    async def _answer(self, context: Context) -> cache_pb2.Answer:
        """The answer that the request's headers name; ends the call when it is not there."""
        value = None
        try:
            key = bytes.fromhex(_header(context, headers.ANSWER_KEY))
            answer = answer_id(key, _header(context, headers.TENANT))
            value = await self._tiers.fetch(answer, self._clock())
        except (ValueError, TidegateError):
            # A model replica can answer this request whatever stands in the header, so it is a miss, not a fault.
            log.warning("answer_key_unusable", request_id=_header(context, headers.REQUEST_ID))
        if value is None:
            self._note("vanished", _header(context, headers.REQUEST_ID))
            await abort(context, TidegateError(Reason.REPLICA_UNAVAILABLE, "this answer is not in the cache any more"))
        return cache_pb2.Answer.FromString(value)

    def _note(self, outcome: str, request_id: str) -> None:
        self._metrics.replays.labels(outcome).inc()
        log.debug("replay_ended", outcome=outcome, request_id=request_id)


def _header(context: Context, name: str) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
