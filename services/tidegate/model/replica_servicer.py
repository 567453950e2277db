"""tidegate.v1.Replica: the credit streams of the schedulers. Messages to calls of the slots and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc
import structlog

from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.model.load import ReplicaLoad
from tidegate.model.slots import SchedulerSession, Slots
from tidegate.v1 import replica_pb2, replica_pb2_grpc

log = structlog.get_logger()

LONGEST_LOAD_INTERVAL_SECONDS: Final = 1.0
"""A load is sent at least so often, as a sign of life."""

LOOK_INTERVAL_SECONDS: Final = 0.1


class ReplicaServicer(replica_pb2_grpc.ReplicaServicer):
    """Serves credits.

    Args:
        load_interval_seconds: the shortest time between two loads.
    """

    def __init__(
        self,
        slots: Slots,
        load: ReplicaLoad,
        *,
        load_interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._load = load
        self._load_interval_seconds = load_interval_seconds
        self._clock = clock

    async def Credits(  # type: ignore[override]  # The stubs know generators only; a coroutine that writes is as good.
        self, request_iterator: AsyncIterator[replica_pb2.SchedulerMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Exchanges capacity with one scheduler until either side ends the stream."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "hello" or not first.hello.scheduler_id:
            error = TidegateError(
                Reason.INVALID_VALUE, "The first message must be `hello`.", field="hello.scheduler_id"
            )
            await abort(context, error)
        await context.write(replica_pb2.ReplicaMessage(load=self._load.snapshot()))
        session = self._slots.connect(first.hello.scheduler_id)
        log.info("scheduler_connected", scheduler_id=session.scheduler_id)
        self._slots.update()
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            await self._write(session, reader, context)
        finally:
            reader.cancel()
            self._slots.disconnect(session)
            log.info("scheduler_left", scheduler_id=session.scheduler_id, overrun=session.overrun)

    async def _read(self, session: SchedulerSession, messages: AsyncIterator[replica_pb2.SchedulerMessage]) -> None:
        try:
            async for message in messages:
                match message.WhichOneof("message"):
                    case "demand":
                        self._slots.ledger.set_demand(
                            session.key,
                            max(0, message.demand.waiting_request_count),
                            max(0, message.demand.realtime_request_count),
                        )
                    case "give_back":
                        self._slots.ledger.give_back(session.key, message.give_back.credit_ids)
                    case _:
                        continue
                self._slots.update()
        finally:
            session.wake.set()

    async def _write(
        self, session: SchedulerSession, reader: asyncio.Task[None], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Sends what is queued at once, and the load when it changed."""
        last_load = replica_pb2.Load()
        sent_at = self._clock()
        while not reader.done() and not session.overrun:
            session.wake.clear()
            for message in session.take():
                await context.write(message)
            load = self._load.snapshot()
            is_news = load != last_load or session.has_arrived
            interval = self._load_interval_seconds if is_news else LONGEST_LOAD_INTERVAL_SECONDS
            if self._clock() - sent_at >= interval:
                message = replica_pb2.ReplicaMessage(load=load)
                message.load.arrived_credit_ids.extend(session.take_arrived())
                await context.write(message)
                last_load, sent_at = load, self._clock()
                interval = LONGEST_LOAD_INTERVAL_SECONDS
            # Averages move by themselves, so it looks now and then without being woken.
            await self._sleep(session, min(LOOK_INTERVAL_SECONDS, sent_at + interval - self._clock()))

    async def _sleep(self, session: SchedulerSession, seconds: float) -> None:
        try:
            await asyncio.wait_for(session.wake.wait(), max(0.001, seconds))
        except TimeoutError:
            return
