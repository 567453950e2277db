"""tidegate.v1.Inference: messages to plain calls and back. Decides nothing.

No call gives anything out, metadata included, before its first event is known: until then an error is a status,
and Envoy may try another replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final
from uuid import uuid4

import grpc
import msgspec
import structlog
from google.api import httpbody_pb2

from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.model import openai_surface, orca
from tidegate.model.answers import Answers, Ask
from tidegate.model.call import CallHeaders, Record, read_headers, time_allowed_seconds
from tidegate.model.load import ReplicaLoad
from tidegate.model.many import ManyAnswers
from tidegate.model.openai_surface import OPERATIONS
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions
from tidegate.openai.response import models_json
from tidegate.text.prompt import in_openai_names
from tidegate.v1 import inference_pb2, inference_pb2_grpc

log = structlog.get_logger()

GENERATE_OPERATION: Final = "generate_content"
"""OpenTelemetry's name for what is neither a chat nor a text completion of OpenAI's."""

Context = grpc.aio.ServicerContext[Any, Any]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The servicer's bounds."""

    default_timeout_seconds: float
    longest_timeout_seconds: float
    write_grace_seconds: float
    many_limit: int
    many_write_seconds: float


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves generation.

    Args:
        mesh: a channel to the mesh listener, for the prompts of GenerateMany.
        model_names: of all models of the mesh; this service's own first.
        is_lite: whether its own is the lite model.
        clock: monotonic seconds.
        unix_seconds: wall time, for what OpenAI calls `created`.
    """

    def __init__(
        self,
        answers: Answers,
        load: ReplicaLoad,
        mesh: grpc.aio.Channel,
        model_names: Sequence[str],
        terms: Terms,
        *,
        is_lite: bool = False,
        clock: Callable[[], float] = time.monotonic,
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        self._answers = answers
        self._load = load
        self._stub = inference_pb2_grpc.InferenceStub(mesh)
        self._model_names = model_names
        self._is_lite = is_lite
        self._terms = terms
        self._clock = clock
        self._unix_seconds = unix_seconds
        self._started_unix_seconds = int(unix_seconds())

    # The stubs know generators only. A coroutine that writes is cancelled in its own code when the client leaves,
    # where a generator would be left lying until it is collected.

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Streams one answer."""
        call = read_headers(context.invocation_metadata())
        record = self._record(call, GENERATE_OPERATION, context, call.request_id or request.request_id)
        ask = Ask(request=request, call=call, record=record, openai_names=False)
        async with self._ending(context, record), aclosing(self._answers.events(ask)) as events:
            first = True
            async for event in events:
                if first and (announced := self._announced(call)):
                    await context.send_initial_metadata(announced)
                first = False
                await context.write(event)

    async def GenerateMany(  # type: ignore[override]
        self, request_iterator: AsyncIterator[inference_pb2.GenerateRequest], context: Context
    ) -> None:
        """Streams many answers."""
        call = read_headers(context.invocation_metadata())
        answers = ManyAnswers(
            self._stub,
            context.write,
            limit=self._terms.many_limit,
            write_seconds=self._terms.many_write_seconds,
            metadata=[(headers.TENANT, call.tenant)],
            remaining_seconds=context.time_remaining,
        )
        try:
            await answers.run(request_iterator)
        except Exception as error:
            await abort(context, _told(error))

    async def ChatCompletions(self, request: httpbody_pb2.HttpBody, context: Context) -> None:  # type: ignore[override]
        """Answers a chat as OpenAI does."""
        await self._openai(request, context, parse_chat_completions)

    async def Completions(self, request: httpbody_pb2.HttpBody, context: Context) -> None:  # type: ignore[override]
        """Continues a text as OpenAI does."""
        await self._openai(request, context, parse_completions)

    async def Models(self, request: inference_pb2.ModelsRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Lists the models, or one."""
        try:
            data = models_json(self._model_names, model=request.model, created_unix_seconds=self._started_unix_seconds)
        except TidegateError as error:
            await abort(context, error)
        return httpbody_pb2.HttpBody(content_type=openai_surface.JSON, data=data)

    async def _openai(
        self, body: httpbody_pb2.HttpBody, context: Context, parse: Callable[[bytes], OpenAIRequest]
    ) -> None:
        call = read_headers(context.invocation_metadata())
        operation = OPERATIONS["chat" if parse is parse_chat_completions else "completion"]
        record = self._record(call, operation, context, call.request_id)
        async with self._ending(context, record):
            request = self._answers.parsed(record, parse, body.data)
            ask = Ask(request=request.generate, call=call, record=record, openai_names=True)
            events = self._answers.events(ask)
            async with (
                aclosing(events),
                aclosing(openai_surface.bodies(request, events, record.request_id, self._unix_seconds)) as bodies,
                in_openai_names(request.grammar_field),
            ):
                first = True
                async for part in bodies:
                    if first:
                        first = False
                        await context.send_initial_metadata(self._http_headers(record, call, request.stream))
                    await context.write(part)

    def _record(self, call: CallHeaders, operation: str, context: Context, request_id: str) -> Record:
        now = self._clock()
        late_seconds = 0.0 if call.sent_at is None else self._load.add_arrival(self._unix_seconds() - call.sent_at)
        allowed = time_allowed_seconds(
            call,
            context.time_remaining(),
            late_seconds=late_seconds,
            default_seconds=self._terms.default_timeout_seconds,
            longest_seconds=self._terms.longest_timeout_seconds,
        )
        return Record(
            operation=operation,
            request_id=request_id or uuid4().hex,
            tenant=call.tenant,
            credit_id=call.credit,
            arrived_at=now,
            deadline=now + allowed,
            queue_seconds=call.queue_seconds,
        )

    def _http_headers(self, record: Record, call: CallHeaders, stream: bool) -> tuple[tuple[str, str], ...]:
        elapsed_ms = int((self._clock() - record.arrived_at + record.queue_seconds) * 1000)
        pairs = (("openai-processing-ms", str(elapsed_ms)), *self._announced(call))
        return (*pairs, ("cache-control", "no-cache")) if stream else pairs

    def _announced(self, call: CallHeaders) -> tuple[tuple[str, str], ...]:
        """What the client is told of how its request was treated."""
        # A replica of the usual model takes over where no lite one is there.
        pairs = ((headers.BROWNOUT, call.brownout), (headers.LITE, call.lite if self._is_lite else ""))
        return tuple((name, value) for name, value in pairs if value)

    def _ending(self, context: Context, record: Record) -> _Ending:
        return _Ending(context, self._load, record.deadline - self._clock() + self._terms.write_grace_seconds)


class _Ending:
    """The end of a call: an error becomes its status, a reader that never reads is cut off, the load goes along."""

    def __init__(self, context: Context, load: ReplicaLoad, seconds: float) -> None:
        self._context = context
        self._load = load
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            error = TidegateError(Reason.DEADLINE_EXCEEDED, "The deadline passed while the client did not read.")
        # A call that was cancelled, or that gRPC could not write to, has nobody left to tell.
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.BaseError):
            await abort(self._context, _told(error))
        if error is None:
            self._context.set_trailing_metadata((orca.trailer(self._load),))


def _told(error: Exception) -> TidegateError:
    """What the client is told of an error; a fault of ours is for the log alone."""
    if isinstance(error, TidegateError):
        return error
    log.error("call_failed", exc_info=error)
    return TidegateError(Reason.INTERNAL_ERROR, "The request failed because of a fault in the service.")
