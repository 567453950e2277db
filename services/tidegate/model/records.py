"""Finished answers on their way to the cache: in the background, bounded, and never in a client's way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import structlog

from tidegate.v1 import cache_pb2, cache_pb2_grpc, inference_pb2

log = structlog.get_logger()


class AnswerCollector:
    """Puts one answer's deltas together. Pure."""

    def __init__(self, answer_key: bytes, tenant: str) -> None:
        self._answer_key = answer_key
        self._tenant = tenant
        self._model = ""
        self._truncated_token_count = 0
        self._texts: list[str] = []
        self._delta = inference_pb2.Delta()

    def add(self, event: inference_pb2.GenerateEvent) -> cache_pb2.RecordRequest | None:
        """Takes the next event; with the last one of a complete answer comes what is to be stored."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._model = event.started.model
            self._truncated_token_count = event.started.truncated_token_count
        elif kind == "delta":
            self._texts.append(event.delta.text)
            self._delta.token_ids.extend(event.delta.token_ids)
            self._delta.logprobs.extend(event.delta.logprobs)
        elif event.finished.reason != inference_pb2.FINISH_REASON_ERROR:
            self._delta.text = "".join(self._texts)
            answer = cache_pb2.Answer(
                model=self._model,
                deltas=[self._delta],
                finished=event.finished,
                truncated_token_count=self._truncated_token_count,
            )
            return cache_pb2.RecordRequest(answer_key=self._answer_key, tenant=self._tenant, answer=answer)
        return None


class AnswerRecorder:
    """Sends answers to the cache, one after the other.

    Args:
        mesh: a channel to the mesh listener.
        queue_limit: answers that wait; more are dropped.
        on_drop: told of each answer that is not stored, with the cause: `full` or `failed`.
    """

    def __init__(
        self, mesh: grpc.aio.Channel, *, queue_limit: int, timeout_seconds: float, on_drop: Callable[[str], None]
    ) -> None:
        self._stub = cache_pb2_grpc.CacheStub(mesh)
        self._queue: asyncio.Queue[cache_pb2.RecordRequest] = asyncio.Queue(max(1, queue_limit))
        self._is_off = queue_limit == 0
        self._timeout_seconds = timeout_seconds
        self._on_drop = on_drop

    def put(self, record: cache_pb2.RecordRequest) -> None:
        """Queues one answer, or drops it."""
        if self._is_off or self._queue.full():
            self._on_drop("full")
        else:
            self._queue.put_nowait(record)

    async def run(self) -> None:
        """Sends what is queued, for ever."""
        while True:
            record = await self._queue.get()
            try:
                await self._stub.Record(record, timeout=self._timeout_seconds)
            except grpc.aio.AioRpcError as error:
                self._on_drop("failed")
                log.debug("answer_not_recorded", code=error.code().name, details=error.details())
