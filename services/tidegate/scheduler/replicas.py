"""The credit streams: one to every replica of the endpoints, kept up, feeding the replica table.

What is decided with the credits is not here. A stream that ends takes its credits with it (they are the replica's
again) and is opened anew with backoff.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final

import grpc
import structlog

from tidegate.common.grpc_clients import open_channel
from tidegate.scheduler.breakers import Result
from tidegate.scheduler.lanes import Lanes
from tidegate.scheduler.observations import Ended
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.replica_table import Replica, ReplicaLoad, ReplicaTable
from tidegate.scheduler.request import ServiceClass
from tidegate.v1 import replica_pb2, replica_pb2_grpc

log = structlog.get_logger()

FIRST_BACKOFF_SECONDS: Final = 0.1
LONGEST_BACKOFF_SECONDS: Final = 1.0

_Call = grpc.aio.StreamStreamCall[replica_pb2.SchedulerMessage, replica_pb2.ReplicaMessage]


class CreditStream:
    """The stream to one replica; `run` keeps it up until it is cancelled.

    Args:
        on_credits: called after credits have come that something may wait for.
        on_outcome: called with each outcome, while its credit still counts as in flight.
        demand_interval_seconds: the least time between two messages to the replica.
    """

    def __init__(
        self,
        replica: Replica,
        table: ReplicaTable,
        lanes: Lanes,
        *,
        scheduler_id: str,
        demand_interval_seconds: float,
        clock: Callable[[], float],
        on_credits: Callable[[], None],
        on_outcome: Callable[[Replica, replica_pb2.Outcome], None],
    ) -> None:
        self.replica = replica
        self.last_load = replica_pb2.Load(replica=replica.address)
        self._table = table
        self._lanes = lanes
        self._scheduler_id = scheduler_id
        self._demand_interval_seconds = demand_interval_seconds
        self._clock = clock
        self._on_credits = on_credits
        self._on_outcome = on_outcome
        self._changed = asyncio.Event()
        self._give_back: list[str] = []

    def demand_changed(self) -> None:
        """What waits has changed; the replica is told soon."""
        self._changed.set()

    async def run(self) -> None:
        """Keeps the stream up."""
        backoff_seconds = FIRST_BACKOFF_SECONDS
        async with open_channel(self.replica.address) as channel:
            stub = replica_pb2_grpc.ReplicaStub(channel)
            while True:
                error = await self._converse(stub)
                if self.replica.is_connected:
                    backoff_seconds = FIRST_BACKOFF_SECONDS
                self._disconnect(error)
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))
                backoff_seconds = min(backoff_seconds * 2, LONGEST_BACKOFF_SECONDS)

    async def _converse(self, stub: replica_pb2_grpc.ReplicaAsyncStub) -> str:
        """One stream from its opening to its end; returns why it ended."""
        call = stub.Credits()
        writer = asyncio.create_task(self._write(call))
        try:
            async for message in call:
                self._receive(message)
            return "the replica ended the stream"
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        finally:
            writer.cancel()
            call.cancel()

    async def _write(self, call: _Call) -> None:
        told: tuple[int, int, int] | None = None
        hello = replica_pb2.SchedulerHello(scheduler_id=self._scheduler_id)
        try:
            await call.write(replica_pb2.SchedulerMessage(hello=hello))
            while True:
                self._changed.clear()
                given_back, self._give_back = self._give_back, []
                if given_back:
                    credit_ids = replica_pb2.CreditIds(credit_ids=given_back)
                    await call.write(replica_pb2.SchedulerMessage(give_back=credit_ids))
                realtime_count = len(self._lanes.lane(ServiceClass.REALTIME))
                demand = (len(self._lanes), self._lanes.token_count, realtime_count)
                if demand != told:
                    await call.write(_demand(demand))
                    told = demand
                await asyncio.sleep(self._demand_interval_seconds)
                await self._changed.wait()
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            # The reader of the same stream says why it ended.
            return

    def _receive(self, message: replica_pb2.ReplicaMessage) -> None:
        now = self._clock()
        if not self.replica.is_connected:
            self._table.connect(self.replica, now)
            log.info("replica_connected", replica=self.replica.address)
        book = self.replica.book
        self.replica.heard_at = now
        match message.WhichOneof("message"):
            case "load":
                self._hear(message.load, now)
            case "grant":
                lease_seconds = message.grant.lease.ToMilliseconds() / 1000
                book.grant(message.grant.credit_ids, lease_seconds, now, preempting=message.grant.preempting)
                self._on_credits()
            case "revoke":
                self._give_back += book.revoke(message.revoke.credit_ids)
                self._changed.set()
            case "outcome":
                self._on_outcome(self.replica, message.outcome)
                self.replica.note_end(message.outcome.credit_id, now)

    def _hear(self, load: replica_pb2.Load, now: float) -> None:
        was_ready = self._table.is_ready(self.replica, now)
        self.last_load = load
        self._table.hear(self.replica, replica_load(load), now)
        is_ready = self._table.is_ready(self.replica, now)
        if is_ready != was_ready:
            log.info("replica_ready" if is_ready else "replica_not_ready", replica=self.replica.address,
                     reason=load.not_ready_reason)  # fmt: skip
        # What waits may have waited for a prompt to be computed, with a credit in hand.
        if is_ready:
            self._on_credits()

    def _disconnect(self, error: str) -> None:
        if self.replica.is_connected or error != self.replica.last_error:
            log.warning("replica_disconnected", replica=self.replica.address, error=error)
        self._give_back.clear()
        self._table.disconnect(self.replica, error)


class CreditStreams:
    """The streams to all replicas of the endpoints."""

    def __init__(
        self,
        table: ReplicaTable,
        open_stream: Callable[[Replica], CreditStream],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._table = table
        self._open_stream = open_stream
        self._spawn = spawn
        self._streams: dict[str, tuple[CreditStream, asyncio.Task[None]]] = {}

    def set_addresses(self, addresses: list[str]) -> None:
        """Opens streams to the new addresses and ends those to the others."""
        added, removed = self._table.set_addresses(addresses)
        for address in removed:
            _, task = self._streams.pop(address)
            task.cancel()
        for address in added:
            replica = self._table.get(address)
            assert replica is not None
            stream = self._open_stream(replica)
            self._streams[address] = (stream, self._spawn(stream.run()))

    def demand_changed(self) -> None:
        """Tells all streams that what waits has changed."""
        for stream, _ in self._streams.values():
            stream.demand_changed()

    def last_load(self, address: str) -> replica_pb2.Load:
        """What the replica of this address last said, whole."""
        return self._streams[address][0].last_load

    async def close(self) -> None:
        """Ends all streams, so that every credit is its replica's again."""
        tasks = [task for _, task in self._streams.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def replica_load(load: replica_pb2.Load) -> ReplicaLoad:
    """The part of a load that decisions need."""
    return ReplicaLoad(
        is_ready=load.ready,
        running_request_count=load.running_request_count,
        waiting_request_count=load.waiting_request_count,
        slot_count=load.slot_count,
        seconds_per_output_token=load.time_per_output_token.ToNanoseconds() / 1e9,
        time_to_first_token_seconds=load.time_to_first_token.ToNanoseconds() / 1e9,
        starting_request_count=load.starting_request_count,
        reuses_prefixes=load.reuses_prefixes,
        late_seconds=load.lateness.ToNanoseconds() / 1e9,
        max_context_tokens=load.max_context_tokens,
        arrived_credit_ids=load.arrived_credit_ids,
        scheduler_count=max(1, load.scheduler_count),
    )


def ended(outcome: replica_pb2.Outcome) -> Ended:
    """The part of an outcome that decisions need."""
    has_first_token = outcome.HasField("time_to_first_token")
    return Ended(
        credit_id=outcome.credit_id,
        is_completed=outcome.outcome == replica_pb2.REQUEST_OUTCOME_COMPLETED,
        first_token_seconds=outcome.time_to_first_token.ToNanoseconds() / 1e9 if has_first_token else None,
        duration_seconds=outcome.duration.ToNanoseconds() / 1e9,
        prompt_token_count=outcome.prompt_token_count,
        completion_token_count=outcome.completion_token_count,
        cached_token_count=outcome.cached_token_count,
    )


def note_outcome(placer: Placer, replica: Replica, outcome: replica_pb2.Outcome, now: float) -> None:
    """Tells the placer what an outcome says of its replica: an answer's time, a failure, or nothing."""
    has_begun = outcome.HasField("time_to_first_token")
    match outcome.outcome:
        case replica_pb2.REQUEST_OUTCOME_FAILED:
            result = Result.FAILED
        case replica_pb2.REQUEST_OUTCOME_COMPLETED:
            result = Result.GOOD
        case replica_pb2.REQUEST_OUTCOME_DEADLINE_EXCEEDED if has_begun:
            # It kept its pace or it did not; the deadline was the client's.
            result = Result.GOOD
        case _:
            result = Result.NOTHING
    placer.note(
        replica.address,
        outcome.credit_id,
        result,
        now,
        seconds=0.0 if outcome.paused else outcome.duration.ToNanoseconds() / 1e9,
        prompt_token_count=outcome.prompt_token_count,
        answer_token_count=outcome.completion_token_count,
    )


def _demand(demand: tuple[int, int, int]) -> replica_pb2.SchedulerMessage:
    request_count, token_count, realtime_count = demand
    return replica_pb2.SchedulerMessage(
        demand=replica_pb2.Demand(
            waiting_request_count=request_count,
            waiting_token_count=token_count,
            realtime_request_count=realtime_count,
        )
    )
