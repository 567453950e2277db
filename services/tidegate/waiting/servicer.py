"""tidegate.v1.Inference of the waiting room: messages to streams of the room and back. Decides nothing.

The methods are served as bytes, because the answers pass as they are. What only the mesh may say about a request
(its tenant, its id, its class, its deadline) goes on with it; what a client asked of this process alone does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from uuid import uuid4

import grpc
import structlog
from google.api import httpbody_pb2
from google.protobuf.message import DecodeError

from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions
from tidegate.v1 import inference_pb2, scheduler_pb2_grpc
from tidegate.waiting.config import Settings
from tidegate.waiting.metrics import OPEN_STREAMS, STATUSES, STREAMS
from tidegate.waiting.place import Place
from tidegate.waiting.room import DoesNotRead, Stream
from tidegate.waiting.surfaces import ServerSentEvents, Surface, TypedEvents

log = structlog.get_logger()

SERVICE_NAME: Final = "tidegate.v1.Inference"

PASSED_ON: Final = (
    headers.TENANT,
    headers.SERVICE_CLASS,
    headers.CLIENT_REQUEST_ID,
    headers.ASKED_TIMEOUT_MS,
    "x-stainless-retry-count",
    "traceparent",
    "tracestate",
)
"""Of a request's headers. Its id goes on too, and its gRPC deadline."""

DEADLINE_MARGIN_SHARE: Final = 0.05
LONGEST_DEADLINE_MARGIN_SECONDS: Final = 0.05
"""A gRPC deadline is passed on so much shorter, so that what it ends in still reaches the client as a message."""

Context = grpc.aio.ServicerContext[bytes, bytes]


class WaitingRoom:
    """Serves the streams.

    Args:
        mesh: a channel to the mesh listener.
        clock: monotonic seconds.
        unix_seconds: wall time, for what OpenAI calls `created`.
    """

    def __init__(
        self,
        mesh: grpc.aio.Channel,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        self._mesh = mesh
        self._scheduler = scheduler_pb2_grpc.SchedulerStub(mesh)
        self._settings = settings
        self._clock = clock
        self._unix_seconds = unix_seconds
        self._stream_count = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        """The methods of tidegate.v1.Inference that are served here; the others are not routed here."""
        methods = {"Generate": self._generate, "ChatCompletions": self._chat, "Completions": self._completions}
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME, {name: grpc.unary_stream_rpc_method_handler(method) for name, method in methods.items()}
        )

    async def _generate(self, request: bytes, context: Context) -> None:
        call = _Call(context)
        try:
            named = inference_pb2.GenerateRequest.FromString(request).request_id
        except DecodeError:
            named = ""  # The service that answers says what is wrong with it.
        await self._serve("Generate", request, call, TypedEvents(named or call.request_id), is_stream=True)

    async def _chat(self, request: bytes, context: Context) -> None:
        await self._openai("ChatCompletions", request, context, parse_chat_completions)

    async def _completions(self, request: bytes, context: Context) -> None:
        await self._openai("Completions", request, context, parse_completions)

    async def _openai(
        self, method: str, request: bytes, context: Context, parse: Callable[[bytes], OpenAIRequest]
    ) -> None:
        call = _Call(context)
        try:
            parsed = parse(httpbody_pb2.HttpBody.FromString(request).data)
        except (TidegateError, DecodeError):
            parsed = None  # The service that answers says what is wrong with it.
        surface = ServerSentEvents(parsed, call.request_id, int(self._unix_seconds()))
        await self._serve(method, request, call, surface, is_stream=parsed is not None and parsed.stream)

    async def _serve(self, method: str, request: bytes, call: _Call, surface: Surface, *, is_stream: bool) -> None:
        """Serves one call; an answer that is no stream passes without status."""
        if self._stream_count >= self._settings.stream_limit:
            STREAMS.labels("full").inc()
            # Envoy takes this for a service that cannot work, and sends the request the ordinary way.
            await abort(call.context, TidegateError(Reason.REPLICA_UNAVAILABLE, "The waiting room is full."))
        self._stream_count += 1
        OPEN_STREAMS.set(self._stream_count)
        place, following = None, None
        if is_stream:
            place = Place(self._scheduler, call.request_id, call.tenant, self._settings.least_interval_seconds)
            following = asyncio.ensure_future(place.follow())
        try:
            await self._run(self._stream(method, request, call, surface, place), call)
        finally:
            if following is not None:
                following.cancel()
            self._stream_count -= 1
            OPEN_STREAMS.set(self._stream_count)

    def _stream(self, method: str, request: bytes, call: _Call, surface: Surface, place: Place | None) -> Stream:
        remote: Any = self._mesh.unary_stream(f"/{SERVICE_NAME}/{method}")
        return Stream(
            call.context,
            remote(request, metadata=call.metadata, timeout=_timeout_seconds(call.context.time_remaining())),
            surface,
            place,
            least_interval_seconds=self._settings.least_interval_seconds,
            longest_silence_seconds=self._settings.longest_silence_seconds,
            write_seconds=self._settings.write_seconds,
            clock=self._clock,
            on_told=STATUSES.inc,
        )

    async def _run(self, stream: Stream, call: _Call) -> None:
        outcome = "left"
        try:
            await stream.run()
            outcome = "ended"
        except TidegateError as error:
            outcome = "refused"
            await abort(call.context, error)
        except grpc.aio.AioRpcError as error:
            outcome = "broken"
            await call.context.abort(error.code(), error.details() or "", error.trailing_metadata() or ())
        except DoesNotRead:
            outcome = "unread"
            message = f"The client left a message unread for {self._settings.write_seconds:g} s."
            await abort(call.context, TidegateError(Reason.DEADLINE_EXCEEDED, message))
        finally:
            STREAMS.labels(outcome).inc()
            log.debug("stream_ended", request_id=call.request_id, outcome=outcome)


class _Call:
    """What a call's headers say, and what of it goes on."""

    def __init__(self, context: Context) -> None:
        self.context = context
        found = _texts(context.invocation_metadata() or ())
        self.request_id = found.get(headers.REQUEST_ID) or uuid4().hex
        self.tenant = found.get(headers.TENANT, headers.DEFAULT_TENANT)
        self.metadata: list[tuple[str, str]] = [(name, found[name]) for name in PASSED_ON if name in found]
        self.metadata.append((headers.REQUEST_ID, self.request_id))


def _timeout_seconds(remaining_seconds: float | None) -> float | None:
    if remaining_seconds is None:
        return None
    return remaining_seconds - min(LONGEST_DEADLINE_MARGIN_SECONDS, remaining_seconds * DEADLINE_MARGIN_SHARE)


def _texts(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}
