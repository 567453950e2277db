"""Watches the scheduler while there are lines to send, and opens the gate as far as it has something to spare."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
import structlog
from google.protobuf import duration_pb2

from tidegate.batch.config import Settings
from tidegate.batch.gate import Gate
from tidegate.batch.metrics import BatchMetrics
from tidegate.batch.spare import Bounds, allowed_in_flight
from tidegate.v1 import scheduler_pb2, scheduler_pb2_grpc

log = structlog.get_logger()

AGAIN_SECONDS: Final = 1.0
"""After a watch that ended."""


class SchedulerWatch:
    """Keeps the gate at what the scheduler last said.

    Args:
        mesh: a channel to the mesh listener.
    """

    def __init__(self, mesh: grpc.aio.Channel, gate: Gate, settings: Settings, metrics: BatchMetrics) -> None:
        self._stub = scheduler_pb2_grpc.SchedulerStub(mesh)
        self._gate = gate
        self._metrics = metrics
        self._silence_seconds = settings.watch_silence_seconds
        self._interval = duration_pb2.Duration()
        self._interval.FromMilliseconds(round(settings.watch_interval_seconds * 1000))
        self._bounds = Bounds(
            in_flight_limit=settings.in_flight_limit,
            urgent_waiting_limit=settings.urgent_waiting_limit,
            reserved_credit_count=settings.reserved_credit_count,
        )

    async def run(self) -> None:
        """Watches until it is cancelled."""
        while True:
            await self._gate.wait_wanted()
            try:
                await self._watch()
            except Exception as error:
                log.warning("scheduler_unwatched", error=_told(error))
                self._allow(0)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _watch(self) -> None:
        """Watches as long as somebody wants to know, plus the silence that the scheduler is allowed."""
        call: Any = self._stub.Watch(scheduler_pb2.WatchRequest(interval=self._interval))
        try:
            while self._gate.is_wanted:
                snapshot = await asyncio.wait_for(call.read(), self._silence_seconds)
                if snapshot is grpc.aio.EOF:
                    raise EOFError("the stream ended")
                self._allow(allowed_in_flight(snapshot, self._gate.in_flight, self._bounds))
        finally:
            call.cancel()
        self._allow(0)

    def _allow(self, count: int) -> None:
        self._gate.allow(count)
        self._metrics.show_gate(allowed=count, in_flight=self._gate.in_flight)


def _told(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"
