"""tidegate.v1.Scheduler: shows queues, replicas and credits to people and dashboards. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final

from google.api import httpbody_pb2
from google.protobuf import duration_pb2, timestamp_pb2

from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.scheduler import queue_messages
from tidegate.scheduler.anomalies import Anomalies, Flag
from tidegate.scheduler.brownout import Brownout
from tidegate.scheduler.cache_client import CacheClient
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.lanes import Waiting
from tidegate.scheduler.lite import Lite
from tidegate.scheduler.neighbours import Neighbours
from tidegate.scheduler.outcomes import Outcome, Outcomes
from tidegate.scheduler.placement import Weights, scores
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.preprocess_client import PreprocessClient
from tidegate.scheduler.queue_status import QueueStatuses, not_found
from tidegate.scheduler.replica_table import ReplicaTable
from tidegate.scheduler.replicas import CreditStreams
from tidegate.scheduler.request import ServiceClass
from tidegate.scheduler.shedding import Shedder
from tidegate.scheduler.tenant_limits import TenantLimits
from tidegate.v1 import scheduler_pb2, scheduler_pb2_grpc

SHORTEST_INTERVAL_SECONDS: Final = 0.1
LONGEST_INTERVAL_SECONDS: Final = 60.0
DEFAULT_INTERVAL_SECONDS: Final = 1.0


class Snapshots:
    """Takes pictures of this scheduler.

    Args:
        answer_token_count: the length of answer for which replicas are scored.
    """

    def __init__(
        self,
        *,
        scheduler_id: str,
        dispatcher: Dispatcher,
        streams: CreditStreams,
        lite: Lite,
        lite_streams: CreditStreams,
        preprocess: PreprocessClient,
        cache: CacheClient,
        outcomes: Outcomes,
        brownout: Brownout,
        shedder: Shedder,
        limits: TenantLimits,
        anomalies: Anomalies,
        weights: Weights,
        answer_token_count: int,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler_id = scheduler_id
        self._dispatcher = dispatcher
        self._streams = streams
        self._lite = lite
        self._lite_streams = lite_streams
        self._preprocess = preprocess
        self._cache = cache
        self._outcomes = outcomes
        self._brownout = brownout
        self._shedder = shedder
        self._limits = limits
        self._anomalies = anomalies
        self._weights = weights
        self._answer_token_count = answer_token_count
        self._clock = clock

    def take(self) -> scheduler_pb2.Snapshot:
        """The scheduler at this moment."""
        now = self._clock()
        time = timestamp_pb2.Timestamp()
        time.GetCurrentTime()
        return scheduler_pb2.Snapshot(
            scheduler_id=self._scheduler_id,
            time=time,
            lanes=[self._lane(service_class, now) for service_class in ServiceClass],
            replicas=[
                *self._replicas(self._dispatcher.table, self._dispatcher.placer, self._streams, now),
                *self._replicas(self._lite.table, self._lite.placer, self._lite_streams, now),
            ],
            totals=self._totals(),
            brownout_step=self._brownout.step,
            limited_tenant_count=len({key.tenant for key in self._limits.limits}),
            dependencies=[
                scheduler_pb2.DependencySnapshot(
                    name=name, reachable=dependency.is_reachable, last_error=dependency.last_error
                )
                for name, dependency in (("preprocess", self._preprocess), ("cache", self._cache))
            ],
            flagged_tenants=[_flagged(flag, now) for flag in self._anomalies.flags()],
            looks_for_anomalies=self._anomalies.enabled,
        )

    def _lane(self, service_class: ServiceClass, now: float) -> scheduler_pb2.LaneSnapshot:
        lane = self._dispatcher.lanes.lane(service_class)
        oldest: Waiting | None = lane.oldest
        return scheduler_pb2.LaneSnapshot(
            service_class=_proto_class(service_class),
            waiting_request_count=len(lane),
            waiting_token_count=lane.token_count,
            waiting_bytes=lane.byte_count,
            request_limit=lane.limits.request_limit,
            token_limit=lane.limits.token_limit,
            byte_limit=lane.limits.byte_limit,
            oldest_wait=_duration(now - oldest.since) if oldest is not None else None,
            tenant_count=lane.queue.tenant_count,
            drain_rate=self._dispatcher.drain.rate(now) or 0.0,
            shed_share=1 - self._shedder.shares[service_class],
        )

    def _replicas(
        self, table: ReplicaTable, placer: Placer, streams: CreditStreams, now: float
    ) -> list[scheduler_pb2.ReplicaSnapshot]:
        ready = table.ready(now)
        slow_start_shares = placer.slow_start_shares(now)
        score_of = dict(zip(ready, scores(ready, self._weights, self._answer_token_count), strict=True))
        return [
            scheduler_pb2.ReplicaSnapshot(
                load=streams.last_load(replica.address),
                connected=replica.is_connected,
                credit_count=replica.book.count,
                in_flight_count=replica.book.in_flight_count,
                score=score_of.get(replica, 0.0),
                last_error=replica.last_error,
                breaker=placer.breakers.state(replica.address, now).value,
                breaker_reason=placer.breakers.reason(replica.address),
                slow_start_share=slow_start_shares.get(replica.address, 0.0),
                preempting_credit_count=replica.book.preempting_count,
            )
            for replica in table
        ]

    def _totals(self) -> scheduler_pb2.Totals:
        counts = self._outcomes.by_outcome
        return scheduler_pb2.Totals(
            received=self._outcomes.received,
            dispatched=counts[Outcome.DISPATCHED],
            replayed=counts[Outcome.REPLAYED],
            passed_through=counts[Outcome.PASSED_THROUGH],
            refused=self._outcomes.refused_by_reason,
            abandoned=counts[Outcome.ABANDONED],
            dispatched_to_lite=self._outcomes.lite_count,
            refused_unread=self._outcomes.refused_unread_count,
        )


class Scheduler(scheduler_pb2_grpc.SchedulerServicer):
    """Serves the snapshots, and the places of those who wait, here or with other schedulers."""

    def __init__(self, snapshots: Snapshots, statuses: QueueStatuses, neighbours: Neighbours) -> None:
        self._snapshots = snapshots
        self._statuses = statuses
        self._neighbours = neighbours

    async def Watch(self, request: scheduler_pb2.WatchRequest, context: Any) -> AsyncIterator[scheduler_pb2.Snapshot]:
        """Sends a snapshot at once, and one each interval after the last was written: a slow reader skips some."""
        try:
            interval_seconds = _interval_seconds(request)
        except TidegateError as error:
            await abort(context, error)
        yield self._snapshots.take()
        while not request.once:
            await asyncio.sleep(interval_seconds)
            yield self._snapshots.take()

    async def GetQueueStatus(
        self, request: scheduler_pb2.GetQueueStatusRequest, context: Any
    ) -> scheduler_pb2.QueueStatus:
        """Says where a request stands."""
        return await self._status(request, context)

    async def QueueStatusPage(
        self, request: scheduler_pb2.GetQueueStatusRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """The same for HTTP."""
        data = queue_messages.to_json(request.request_id, await self._status(request, context))
        return httpbody_pb2.HttpBody(content_type="application/json", data=data)

    async def WatchQueueStatus(  # type: ignore[override]  # grpc.aio takes a coroutine that writes by itself, too.
        self, request: scheduler_pb2.WatchQueueStatusRequest, context: Any
    ) -> None:
        """Sends a status each interval, and the last one when the request has left."""
        try:
            interval_seconds = _interval_seconds(request)
            patience_seconds = queue_messages.patience_seconds(request)
            tenant = queue_messages.tenant_of(context)
            statuses = self._followed(request.request_id, tenant, interval_seconds, patience_seconds)
            if not queue_messages.is_asked_by_scheduler(context):
                statuses = self._neighbours.follow(statuses, request, tenant)
            async with aclosing(statuses):
                async for status in statuses:
                    await context.write(status)
        except TidegateError as error:
            await abort(context, error)

    async def _followed(
        self, request_id: str, tenant: str | None, interval_seconds: float, patience_seconds: float
    ) -> AsyncGenerator[scheduler_pb2.QueueStatus, None]:
        statuses = self._statuses.follow(
            request_id, tenant, interval_seconds=interval_seconds, patience_seconds=patience_seconds
        )
        async with aclosing(statuses):
            async for status in statuses:
                yield queue_messages.to_proto(status)

    async def _status(self, request: scheduler_pb2.GetQueueStatusRequest, context: Any) -> scheduler_pb2.QueueStatus:
        tenant = queue_messages.tenant_of(context)
        own = self._statuses.status(request.request_id, tenant)
        if own is not None:
            return queue_messages.to_proto(own)
        found = None
        if not queue_messages.is_asked_by_scheduler(context):
            found = await self._neighbours.status(request, tenant)
        if found is None:
            await abort(context, not_found(request.request_id))
        return found


def _interval_seconds(request: scheduler_pb2.WatchRequest | scheduler_pb2.WatchQueueStatusRequest) -> float:
    if not request.HasField("interval"):
        return DEFAULT_INTERVAL_SECONDS
    seconds = request.interval.ToMilliseconds() / 1000
    if not SHORTEST_INTERVAL_SECONDS <= seconds <= LONGEST_INTERVAL_SECONDS:
        message = f"interval is {seconds} s, must be from 0.1 s to 60 s"
        raise TidegateError(Reason.INVALID_VALUE, message, field="interval")
    return seconds


def _flagged(flag: Flag, now: float) -> scheduler_pb2.FlaggedTenant:
    return scheduler_pb2.FlaggedTenant(
        tenant=flag.tenant,
        score=flag.score,
        feature=flag.feature,
        flagged_for=_duration(now - flag.since),
        expires_in=_duration(max(0.0, flag.until - now)),
    )


def _proto_class(service_class: ServiceClass) -> Any:
    return int(service_class)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
