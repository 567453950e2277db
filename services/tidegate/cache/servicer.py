"""tidegate.v1.Cache: messages to calls of the tiers and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from tidegate.cache.answers import FULL, answer_id, why_not_kept
from tidegate.cache.config import Settings
from tidegate.cache.metrics import CacheMetrics
from tidegate.cache.tiers import Tiers
from tidegate.common.errors import TidegateError, abort
from tidegate.v1 import cache_pb2, cache_pb2_grpc

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


class CacheServicer(cache_pb2_grpc.CacheServicer):
    """Looks up, records and forgets answers.

    Args:
        clock: a clock in seconds that does not go back; a test has its own.
    """

    def __init__(
        self, tiers: Tiers, settings: Settings, metrics: CacheMetrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tiers = tiers
        self._settings = settings
        self._metrics = metrics
        self._clock = clock

    async def LookUp(self, request: cache_pb2.LookUpRequest, context: Context) -> cache_pb2.LookUpResponse:
        """Says whether an answer is known, and holds it for the replay."""
        try:
            answer = answer_id(request.answer_key, request.tenant)
        except TidegateError as error:
            await abort(context, error)
        tier = await self._tiers.look_up(answer, hold_seconds=self._settings.hold_seconds, now=self._clock())
        log.debug("looked_up", answer_key=answer.answer_key.hex(), tenant=answer.tenant, tier=tier)
        return cache_pb2.LookUpResponse(hit=tier is not None, tier=tier or "")

    async def Record(self, request: cache_pb2.RecordRequest, context: Context) -> cache_pb2.RecordResponse:
        """Stores a finished answer, or says why not."""
        try:
            answer = answer_id(request.answer_key, request.tenant)
        except TidegateError as error:
            await abort(context, error)
        reason = why_not_kept(
            request.answer,
            largest_answer_bytes=self._settings.largest_answer_bytes,
            enabled=self._settings.memory_bytes > 0,
        )
        if not reason:
            value = request.answer.SerializeToString()
            reason = "" if await self._tiers.put(answer, value, self._time_to_live(request), self._clock()) else FULL
        self._metrics.records.labels(reason.lower() or "stored").inc()
        log.debug("recorded", answer_key=answer.answer_key.hex(), tenant=answer.tenant, reason=reason)
        return cache_pb2.RecordResponse(stored=not reason, reason=reason)

    async def Clear(self, request: cache_pb2.ClearRequest, context: Context) -> cache_pb2.ClearResponse:
        """Forgets a tenant's answers, or all."""
        count = await self._tiers.clear(request.tenant or None)
        log.info("cleared", tenant=request.tenant or None, answer_count=count)
        return cache_pb2.ClearResponse(answer_count=count)

    def _time_to_live(self, request: cache_pb2.RecordRequest) -> float:
        longest = self._settings.time_to_live_seconds
        if not request.HasField("time_to_live"):
            return longest
        return min(longest, request.time_to_live.ToMilliseconds() / 1000)
