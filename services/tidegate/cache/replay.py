"""tidegate.v1.Inference of the cache: tells a stored answer again, on every surface that the model has.

Envoy sends a request here when the scheduler's look-up found its answer. Until the first message nothing is
promised: an answer that is gone by now is UNAVAILABLE, and Envoy goes on to the next priority of the cluster,
which are the model's replicas.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
import structlog
from google.api import httpbody_pb2

from tidegate.cache.answers import answer_id, replay_events
from tidegate.cache.metrics import CacheMetrics
from tidegate.cache.reports import COMPLETED, FAILED, REFUSED, Replay, report
from tidegate.cache.tiers import Tiers
from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions
from tidegate.openai.response import ResponseFormatter
from tidegate.v1 import cache_pb2, inference_pb2, inference_pb2_grpc

log = structlog.get_logger()

JSON_CONTENT_TYPE: Final = "application/json"
STREAM_CONTENT_TYPE: Final = "text/event-stream"

GENERATE_OPERATION: Final = "generate_content"

DEFAULT_SERVICE_CLASS: Final = "standard"
"""Where the scheduler, who says the class, was not asked."""

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
        replay = self._replay(GENERATE_OPERATION, context)
        replay.client_request_id = request.request_id
        answer = await self._answer(context)
        with self._reporting(replay, answer):
            request_id = request.request_id or replay.request_id
            events = replay_events(answer, request_id, elapsed_seconds=self._clock() - replay.arrived_at)
            await context.send_initial_metadata(((headers.CACHED, "hit"),))
            for event in events:
                yield event

    async def ChatCompletions(
        self, request: httpbody_pb2.HttpBody, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Replays as OpenAI's chat completion, JSON or server-sent events."""
        async for part in self._replay_http(request, "chat", parse_chat_completions, context):
            yield part

    async def Completions(
        self, request: httpbody_pb2.HttpBody, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Replays as OpenAI's text completion, JSON or server-sent events."""
        async for part in self._replay_http(request, "text_completion", parse_completions, context):
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
        self, request: httpbody_pb2.HttpBody, operation: str, parse: Callable[[bytes], OpenAIRequest], context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        replay = self._replay(operation, context)
        try:
            parsed = parse(request.data)
        except TidegateError as error:
            replay.end(REFUSED, error.reason.name)
            self._report(replay)
            await abort(context, error)
        answer = await self._answer(context)
        with self._reporting(replay, answer):
            formatter = ResponseFormatter(parsed, replay.request_id, int(self._wall_clock()))
            elapsed_seconds = self._clock() - replay.arrived_at
            events = list(replay_events(answer, replay.request_id, elapsed_seconds=elapsed_seconds))
            await context.send_initial_metadata(_http_headers(replay, elapsed_seconds, stream=parsed.stream))
            if parsed.stream:
                for event in events:
                    data = formatter.event(event)
                    if data:
                        yield httpbody_pb2.HttpBody(content_type=STREAM_CONTENT_TYPE, data=data)
            else:
                yield httpbody_pb2.HttpBody(content_type=JSON_CONTENT_TYPE, data=formatter.complete(events))

    def _replay(self, operation: str, context: Context) -> Replay:
        return Replay(
            operation=operation,
            request_id=_header(context, headers.REQUEST_ID),
            tenant=_header(context, headers.TENANT) or headers.DEFAULT_TENANT,
            service_class=_header(context, headers.SERVICE_CLASS) or DEFAULT_SERVICE_CLASS,
            queue_seconds=_milliseconds(_header(context, headers.QUEUE_MS)) / 1000,
            arrived_at=self._clock(),
        )

    @contextmanager
    def _reporting(self, replay: Replay, answer: cache_pb2.Answer) -> Iterator[None]:
        """Reports the replay at its end, whatever that is."""
        replay.begin(answer, self._clock())
        try:
            yield
            replay.end(COMPLETED)
        except Exception:
            replay.end(FAILED, Reason.INTERNAL_ERROR.name)
            raise
        finally:
            self._metrics.replays.labels("replayed" if replay.outcome == COMPLETED else replay.outcome).inc()
            self._report(replay)

    def _report(self, replay: Replay) -> None:
        replay.ended_at = self._clock()
        report(replay, self._metrics)

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
            # No log line of the request: Envoy sends it on to a replica, which will have one.
            self._metrics.replays.labels("vanished").inc()
            log.debug("answer_vanished", request_id=_header(context, headers.REQUEST_ID))
            await abort(context, TidegateError(Reason.REPLICA_UNAVAILABLE, "this answer is not in the cache any more"))
        return cache_pb2.Answer.FromString(value)


def _http_headers(replay: Replay, elapsed_seconds: float, *, stream: bool) -> tuple[tuple[str, str], ...]:
    """What OpenAI's clients read beside the body; the time is the mesh's, the queue's included."""
    processing_ms = int((replay.queue_seconds + elapsed_seconds) * 1000)
    pairs = ((headers.CACHED, "hit"), ("openai-processing-ms", str(processing_ms)))
    return (*pairs, ("cache-control", "no-cache")) if stream else pairs


def _milliseconds(text: str) -> float:
    """A header's number; one that makes no sense is as if absent."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if 0 <= value < math.inf else 0.0


def _header(context: Context, name: str) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
