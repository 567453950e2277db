"""The newest place of one request in the queue, kept by a stream of the scheduler's.

A scheduler that is away costs the status, not the answer: the stream is opened again now and then, as long as
somebody waits.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
import structlog

from tidegate.v1 import scheduler_pb2, scheduler_pb2_grpc

log = structlog.get_logger()

PATIENCE_SECONDS: Final = 60.0
"""How long the scheduler may wait for the request: its body is read and its prompt prepared before it queues."""

RETRY_SECONDS: Final = 1.0


class Place:
    """Follows one request.

    Attributes:
        status: the newest; None while the request does not wait.
        changed: set when `status` has changed; whoever reads it clears it.
    """

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerStub, request_id: str, tenant: str, interval: float) -> None:
        self.status: scheduler_pb2.QueueStatus | None = None
        self.changed = asyncio.Event()
        self._stub = stub
        self._metadata = (("x-tidegate-tenant", tenant),)
        self._request = scheduler_pb2.WatchQueueStatusRequest(request_id=request_id)
        self._request.interval.FromMilliseconds(round(interval * 1000))
        self._request.patience.FromMilliseconds(round(PATIENCE_SECONDS * 1000))

    async def follow(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self._follow_once()
            await asyncio.sleep(RETRY_SECONDS)

    async def _follow_once(self) -> None:
        call: Any = self._stub.WatchQueueStatus(self._request, metadata=self._metadata)
        try:
            async for status in call:
                is_waiting = status.state == scheduler_pb2.QUEUE_STATE_WAITING
                self._set(status if is_waiting else None)
        except grpc.aio.AioRpcError as error:
            log.debug("status_not_known", request_id=self._request.request_id, code=error.code().name)
        finally:
            call.cancel()
            self._set(None)

    def _set(self, status: scheduler_pb2.QueueStatus | None) -> None:
        if _shown(status) != _shown(self.status):
            self.changed.set()
        self.status = status


def _shown(status: scheduler_pb2.QueueStatus | None) -> tuple[int, int] | None:
    """What of it is worth telling anew: the position, and the time in whole seconds."""
    return None if status is None else (status.position, status.expected_wait.seconds)
