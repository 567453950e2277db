"""tidegate.v1.Preprocess: messages to prompts and back.

Invariants: every prompt read gets exactly one answer; a fault in one request touches neither the others nor the
stream; the arena is used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import structlog

from tidegate.common.arena import Arena
from tidegate.common.errors import Reason, TidegateError, to_refusal
from tidegate.preprocess.config import Settings
from tidegate.preprocess.metrics import PreprocessMetrics
from tidegate.preprocess.preparation import Preparation, body_kind_name, prepare
from tidegate.preprocess.window import Window
from tidegate.text.model_files import TextModel
from tidegate.v1 import preprocess_pb2, preprocess_pb2_grpc, tensor_pb2

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


class PreprocessServicer(preprocess_pb2_grpc.PreprocessServicer):
    """Prepares prompts.

    Args:
        threads: where large bodies are worked on.
        clock: CLOCK_MONOTONIC in seconds, because the arena's leases are in it.
    """

    def __init__(
        self,
        model: TextModel,
        arena: Arena,
        threads: ThreadPoolExecutor,
        settings: Settings,
        metrics: PreprocessMetrics,
        *,
        lite_model: TextModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._lite_model = lite_model
        self._arena = arena
        self._threads = threads
        self._settings = settings
        self._metrics = metrics
        self._clock = clock

    async def Prepare(  # type: ignore[override]  # grpc.aio takes a coroutine that writes by itself, too.
        self, request_iterator: AsyncIterator[preprocess_pb2.PrepareRequest], context: Context
    ) -> None:
        """Answers each request when its prompt is ready; small ones at once, large ones from a thread."""
        window = Window(self._settings.in_flight_limit, self._settings.in_flight_bytes)
        writing = asyncio.Lock()

        async def answer(request: preprocess_pb2.PrepareRequest, arrived_at: float, *, inline: bool) -> None:
            try:
                response = await self._answer(request, arrived_at, inline=inline)
                async with writing:
                    await context.write(response)
            finally:
                window.leave(len(request.body))

        with self._metrics.streams.track_inprogress():
            async with asyncio.TaskGroup() as tasks:
                async for request in request_iterator:
                    for handle in request.releases:
                        self._arena.release(handle)
                    if request.releases and not request.request_id:
                        continue
                    arrived_at = self._clock()
                    await window.enter(len(request.body))
                    if len(request.body) <= self._settings.inline_body_bytes:
                        await answer(request, arrived_at, inline=True)
                    else:
                        tasks.create_task(answer(request, arrived_at, inline=False))

    async def _answer(
        self, request: preprocess_pb2.PrepareRequest, arrived_at: float, *, inline: bool
    ) -> preprocess_pb2.PrepareResponse:
        response = preprocess_pb2.PrepareResponse(request_id=request.request_id)
        reason = ""
        with self._metrics.in_flight.track_inprogress():
            try:
                preparation = await self._prepare(request, inline=inline)
                response.prepared.CopyFrom(self._to_message(preparation))
            except TidegateError as error:
                reason = error.reason.name
                response.error.CopyFrom(to_refusal(error))
            except Exception:
                reason = Reason.INTERNAL_ERROR.name
                log.exception("prepare_failed", request_id=request.request_id)
                fault = TidegateError(Reason.INTERNAL_ERROR, "the prompt could not be prepared")
                response.error.CopyFrom(to_refusal(fault))
        self._note(request, response, reason, self._clock() - arrived_at)
        return response

    async def _prepare(self, request: preprocess_pb2.PrepareRequest, *, inline: bool) -> Preparation:
        arguments = (request, self._model, self._lite_model)
        if inline:
            return prepare(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, prepare, *arguments)

    def _to_message(self, preparation: Preparation) -> preprocess_pb2.PreparedPrompt:
        prompt = preparation.prompt
        message = preprocess_pb2.PreparedPrompt(
            model=prompt.model,
            prompt_token_count=prompt.prompt_token_count,
            max_tokens=prompt.max_tokens,
            service_class=prompt.service_class,
            block_hashes=prompt.block_hashes,
            answer_key=prompt.answer_key,
            stream=preparation.stream,
            is_portable=preparation.is_portable,
        )
        handle = self._arena.write(prompt.token_ids.data, lease_seconds=self._settings.lease_seconds, now=self._clock())
        if handle is None:
            self._metrics.arena_full.inc()
            return message
        message.tokens.data_type = tensor_pb2.DATA_TYPE_INT32
        message.tokens.shape.append(prompt.prompt_token_count)
        message.tokens.shared_memory.CopyFrom(handle)
        return message

    def _note(
        self,
        request: preprocess_pb2.PrepareRequest,
        response: preprocess_pb2.PrepareResponse,
        reason: str,
        seconds: float,
    ) -> None:
        kind = body_kind_name(request.body_kind)
        self._metrics.duration.labels(kind).observe(seconds)
        if reason:
            self._metrics.refusals.labels(reason).inc()
        else:
            self._metrics.prompt_tokens.observe(response.prepared.prompt_token_count)
        log.debug(
            "prepared",
            request_id=request.request_id,
            tenant=request.tenant,
            body_kind=kind,
            body_bytes=len(request.body),
            prompt_token_count=response.prepared.prompt_token_count,
            reason=reason or None,
            duration_seconds=seconds,
        )
