"""One scheduler, put together: what `__main__` runs and what the tests start."""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import structlog
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc
from grpc_health.v1 import health_pb2

from tidegate.common import memory
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.common.limits_file import write_limits
from tidegate.common.shed_file import NOTHING_REFUSED, RETRY_STEPS_SECONDS, retry_step, write_shares
from tidegate.scheduler.admission import Admission
from tidegate.scheduler.anomalies import Anomalies
from tidegate.scheduler.anomalies import Terms as AnomalyTerms
from tidegate.scheduler.answer_lengths import AnswerLengths
from tidegate.scheduler.breakers import BreakerTerms
from tidegate.scheduler.brownout import Brownout, Signs, Terms
from tidegate.scheduler.cache_client import CacheClient
from tidegate.scheduler.circuit import Circuit
from tidegate.scheduler.config import Settings
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.endpoints import EndpointsFile
from tidegate.scheduler.expectations import Expectations
from tidegate.scheduler.forecast import DrainRate, WorkRates
from tidegate.scheduler.gauges import Gauges
from tidegate.scheduler.lanes import Floors, LaneLimits, Lanes
from tidegate.scheduler.lite import Lite
from tidegate.scheduler.neighbours import Neighbours
from tidegate.scheduler.observations import Observations
from tidegate.scheduler.outcomes import Outcomes
from tidegate.scheduler.outlook import Outlook
from tidegate.scheduler.pipeline import Pipeline
from tidegate.scheduler.placement import Policy, Weights
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.preprocess_client import PreprocessClient
from tidegate.scheduler.queue import Queue
from tidegate.scheduler.queue_status import QueueStatuses
from tidegate.scheduler.replica_table import Replica, ReplicaTable
from tidegate.scheduler.replicas import CreditStream, CreditStreams, ended, note_outcome
from tidegate.scheduler.request import ServiceClass
from tidegate.scheduler.servicer import LEFT_LOOKS, LEFT_SECONDS, ExternalProcessor
from tidegate.scheduler.shedding import Shedder
from tidegate.scheduler.tenant_habits import TenantHabits
from tidegate.scheduler.tenant_limits import TenantLimits
from tidegate.scheduler.watch import Scheduler, Snapshots
from tidegate.v1 import replica_pb2, scheduler_pb2_grpc

log = structlog.get_logger()

EXT_PROC_NAME: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
SCHEDULER_NAME: Final = "tidegate.v1.Scheduler"
FIRST_TOKEN_PERCENTILE: Final = 0.95
"""Of the times to first token that tell how a class fares."""

PEAK_REQUESTS: Final = 1_000
"""After so many at once, what they took is given back to the system when nothing is left."""

RELEASE_SECONDS: Final = LEFT_LOOKS * LEFT_SECONDS + 15.0
"""So long after the last of them: when nothing is held any more, thousands of streams are still to be ended."""

PICKER_HEALTH_NAMES: Final = ("liveness", "readiness")
"""The health services that the Gateway API's picker protocol asks for."""


class SchedulerService:
    """Everything of one scheduler process; built on its event loop.

    Args:
        clock: monotonic seconds.
        on_fault: called when a task that should run for ever ends by a fault of ours; the scheduler is of no use then.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_fault: Callable[[BaseException], None] = lambda fault: None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._on_fault = on_fault
        self.scheduler_id = uuid.uuid4().hex
        weights = Weights(settings.latency_weight, settings.queue_weight, settings.prefix_weight)
        self.anomalies = Anomalies(_anomaly_terms(settings), clock)
        self.outcomes = Outcomes(self.anomalies)
        floors = lane_floors(settings)
        lanes = Lanes(
            lane_limits(settings),
            floors=floors,
            order=settings.order,
            weights=settings.tenant_weights,
        )
        table = _table(settings, clock())
        work = WorkRates(settings.drain_half_life_seconds)
        self.dispatcher = Dispatcher(
            lanes,
            table,
            DrainRate(settings.drain_half_life_seconds),
            weights=weights,
            alternative_count=settings.alternative_count,
            work=work,
            placer=placer_of(settings, table, weights),
        )
        self.expectations = expectations_of(settings, lanes, table, work, clock())
        self.streams = CreditStreams(table, self._open_stream, self._spawn)
        lite_table = _table(settings, clock())
        self.lite = Lite(
            settings.lite_model_name,
            settings.lite_prompt_token_limit,
            lite_table,
            placer_of(settings, lite_table, weights),
        )
        self._lite_streams = CreditStreams(lite_table, self._open_lite_stream, self._spawn)
        self.queue_statuses = QueueStatuses(self.dispatcher, clock)
        self.queue = Queue(self.dispatcher, clock, self.streams.demand_changed, self.queue_statuses.following)
        self._channel = open_channel(settings.mesh_address)
        self.preprocess = PreprocessClient(
            self._channel,
            in_flight_limit=settings.prepare_in_flight_limit,
            timeout_seconds=settings.prepare_timeout_seconds,
            patience_seconds=settings.prepare_patience_seconds,
            circuit=self._circuit(),
            clock=clock,
        )
        self.cache = CacheClient(
            self._channel, timeout_seconds=settings.cache_timeout_seconds, circuit=self._circuit(), clock=clock
        )
        self._admission = Admission(
            lanes,
            replica_grace_seconds=settings.replica_grace_seconds,
            held_request_limit=settings.held_request_limit,
            default_retry_seconds=settings.default_retry_seconds,
            total_limits=LaneLimits(
                settings.waiting_request_limit, settings.waiting_token_limit, settings.waiting_byte_limit
            ),
            habits=self.expectations.habits,
            brownout=self.expectations.brownout,
        )
        self.shedder = Shedder(
            late_seconds=settings.shed_late_seconds,
            drain_seconds=settings.shed_drain_seconds,
            now=clock(),
            floors=floors,
        )
        self.limits = TenantLimits(clock())
        self._held_peak = 0
        self._release_at = math.inf
        self.pipeline = Pipeline(
            settings,
            admission=self._admission,
            queue=self.queue,
            preprocess=self.preprocess,
            cache=self.cache,
            outcomes=self.outcomes,
            shedder=self.shedder,
            limits=self.limits,
            expectations=self.expectations,
            anomalies=self.anomalies,
            lite=self.lite,
            heeds_prefixes=lambda: self.dispatcher.placer.heeds_prefixes,
            clock=clock,
        )
        self.snapshots = Snapshots(
            scheduler_id=self.scheduler_id,
            dispatcher=self.dispatcher,
            streams=self.streams,
            lite=self.lite,
            lite_streams=self._lite_streams,
            preprocess=self.preprocess,
            cache=self.cache,
            outcomes=self.outcomes,
            brownout=self.expectations.brownout,
            shedder=self.shedder,
            limits=self.limits,
            anomalies=self.anomalies,
            weights=weights,
            answer_token_count=settings.expected_answer_token_count,
            clock=clock,
        )
        self._neighbours = Neighbours()
        self._endpoints = EndpointsFile(
            settings.endpoints_file, settings.endpoints_poll_seconds, self.streams.set_addresses
        )
        self.server = Server(settings.host, settings.port)
        self._tasks: list[asyncio.Task[None]] = []
        self.gauges = Gauges(
            self.dispatcher, self.lite, self.outcomes, self.shedder, self.limits, self.expectations.brownout, clock
        )

    async def start(self) -> None:
        """Connects to the rest of the mesh and listens; raises OSError when the port is taken."""
        processor = ExternalProcessor(self.pipeline, self.outcomes, self._clock)
        ext_proc_grpc.add_ExternalProcessorServicer_to_server(processor, self.server.grpc)
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(
            Scheduler(self.snapshots, self.queue_statuses, self._neighbours), self.server.grpc
        )
        for name in (EXT_PROC_NAME, SCHEDULER_NAME):
            self.server.add_service_name(name)
        await self.server.start()
        for name in PICKER_HEALTH_NAMES:
            await self.server.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._tasks = [
            self._spawn(self._endpoints.watch()),
            self._spawn(self.preprocess.run()),
            self._spawn(self._tick()),
            self._spawn(self.anomalies.run()),
        ]
        if self._settings.schedulers_file:
            self._neighbours.own_address = f"{self._settings.host}:{self.server.port}"
            others = EndpointsFile(
                self._settings.schedulers_file, self._settings.endpoints_poll_seconds, self._neighbours.set_addresses
            )
            self._tasks.append(self._spawn(others.watch()))
        if self._settings.lite_endpoints_file:
            endpoints = EndpointsFile(
                self._settings.lite_endpoints_file,
                self._settings.endpoints_poll_seconds,
                self._lite_streams.set_addresses,
            )
            self._tasks.append(self._spawn(endpoints.watch()))
        if self._settings.shed_file:
            self._tasks.append(self._spawn(self._shed(Path(self._settings.shed_file))))
        if self._settings.limits_file:
            self._tasks.append(self._spawn(self._limit(Path(self._settings.limits_file))))

    async def close(self) -> None:
        """Ends what `start` began, but for the server, which whoever runs it stops first."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.streams.close()
        await self._lite_streams.close()
        await self._neighbours.close()
        await self._channel.close()

    async def _tick(self) -> None:
        """Looks after what no message tells: leases that end, and replicas that stay away."""
        while True:
            await asyncio.sleep(self._settings.tick_seconds)
            now = self._clock()
            self.dispatcher.placer.tick(now)
            self.lite.placer.tick(now)
            conditions = self.pipeline.conditions()
            if conditions.absence_seconds > self._settings.replica_absence_limit_seconds:
                self.queue.refuse_all(lambda: self._admission.no_replica(self.pipeline.conditions()))
            self.queue.match()
            self._look_at_brownout(now)
            await self._look_at_memory(now)

    def _look_at_brownout(self, now: float) -> None:
        brownout, before = self.expectations.brownout, self.expectations.brownout.step
        lanes, observations = self.dispatcher.lanes, self.expectations.observations
        signs = {one: signs_of(one, lanes, observations, now) for one in ServiceClass}
        if brownout.look(signs, now, is_idle=self.dispatcher.is_idle):
            log.warning("brownout", step=brownout.step, before=before)

    async def _look_at_memory(self, now: float) -> None:
        held_count = self.outcomes.held_request_count
        self._held_peak = max(self._held_peak, held_count)
        if held_count == 0 and self._held_peak >= PEAK_REQUESTS:
            self._held_peak = 0
            self._release_at = now + RELEASE_SECONDS
        if now >= self._release_at:
            self._release_at = math.inf
            await memory.release()

    async def _shed(self, file: Path) -> None:
        """Tells Envoy what to refuse before it asks here, and when that may come back; nothing, at the start and at the
        end."""
        write_shares(file, NOTHING_REFUSED)
        told_seconds = RETRY_STEPS_SECONDS[0]
        try:
            while True:
                await asyncio.sleep(self._settings.shed_interval_seconds)
                now, was_shedding = self._clock(), self.shedder.is_shedding
                is_new = self.shedder.end_interval(now, self.dispatcher.table.late_seconds(now))
                seconds = retry_step(self._admission.room_seconds(self.dispatcher.drain.rate(now)))
                if is_new or (seconds != told_seconds and (self.shedder.is_shedding or self.limits.limits)):
                    shares = {one.label: share for one, share in self.shedder.shares.items()}
                    write_shares(file, shares, seconds)
                    told_seconds = seconds
                    if self.shedder.is_shedding != was_shedding:
                        log.warning("shedding_begins" if not was_shedding else "shedding_ends", shares=shares)
        finally:
            write_shares(file, NOTHING_REFUSED)

    async def _limit(self, file: Path) -> None:
        """Tells Envoy which tenants to limit; none, at the start and at the end."""
        write_limits(file, [])
        try:
            while True:
                await asyncio.sleep(self._settings.limit_interval_seconds)
                before, now = self.limits.limits.keys(), self._clock()
                if self.limits.end_interval(now, self.dispatcher.table.scheduler_count(now)):
                    limits = self.limits.limits
                    write_limits(file, [(*key, rate) for key, rate in limits.items()])
                    for key in before ^ limits.keys():
                        rate = limits.get(key)
                        log.warning("tenant_limited", tenant=key.tenant, service_class=key.class_name, rate=rate)
        finally:
            write_limits(file, [])

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        fault = task.exception()
        assert fault is not None, "a task that should run for ever has returned"
        log.error("task_failed", exc_info=fault)
        self._on_fault(fault)

    def _open_stream(self, replica: Replica) -> CreditStream:
        return CreditStream(
            replica,
            self.dispatcher.table,
            self.dispatcher.lanes,
            scheduler_id=self.scheduler_id,
            demand_interval_seconds=self._settings.demand_interval_seconds,
            clock=self._clock,
            on_credits=self.queue.match,
            on_outcome=self._note_outcome,
        )

    def _open_lite_stream(self, replica: Replica) -> CreditStream:
        return CreditStream(
            replica,
            self.lite.table,
            Lanes(lane_limits(self._settings)),  # Nothing waits for it.
            scheduler_id=self.scheduler_id,
            demand_interval_seconds=self._settings.demand_interval_seconds,
            clock=self._clock,
            on_credits=lambda: None,
            on_outcome=self._note_lite_outcome,
        )

    def _note_outcome(self, replica: Replica, outcome: replica_pb2.Outcome) -> None:
        now = self._clock()
        note_outcome(self.dispatcher.placer, replica, outcome, now)
        self.expectations.observations.end(ended(outcome), now)
        self.shedder.see_end()

    def _note_lite_outcome(self, replica: Replica, outcome: replica_pb2.Outcome) -> None:
        now = self._clock()
        note_outcome(self.lite.placer, replica, outcome, now)
        self.expectations.observations.end(ended(outcome), now)
        self.shedder.see_end()

    def _circuit(self) -> Circuit:
        return Circuit(self._settings.dependency_failure_limit, self._settings.dependency_pause_seconds)


def signs_of(service_class: ServiceClass, lanes: Lanes, observations: Observations, now: float) -> Signs:
    """How a class fares."""
    oldest = lanes.lane(service_class).oldest
    return Signs(
        queue_delay_seconds=0.0 if oldest is None else now - oldest.since,
        first_token_seconds=observations.first_token_percentile(service_class, FIRST_TOKEN_PERCENTILE, now),
        unloaded_seconds=observations.first_token_seconds,
    )


def expectations_of(settings: Settings, lanes: Lanes, table: ReplicaTable, work: WorkRates, now: float) -> Expectations:
    """What the scheduler knows at its start, by these settings."""
    observations = Observations(lanes, AnswerLengths(settings.expected_answer_token_count))
    terms = Terms(
        settings.brownout_queue_delay_seconds,
        settings.brownout_first_token_seconds,
        settings.brownout_up_seconds,
        settings.brownout_down_seconds,
    )
    outlook = Outlook(lanes, table, work, observations)
    brownout = Brownout(terms, now, has_lite=bool(settings.lite_model_name))
    return Expectations(outlook, observations, TenantHabits(), brownout, settings.answer_quantile)


def _table(settings: Settings, now: float) -> ReplicaTable:
    return ReplicaTable(
        margin_seconds=settings.credit_margin_seconds, silence_seconds=settings.replica_silence_seconds, now=now
    )


def _anomaly_terms(settings: Settings) -> AnomalyTerms:
    return AnomalyTerms(
        enabled=settings.anomalies_enabled,
        window_seconds=settings.anomaly_window_seconds,
        interval_seconds=settings.anomaly_interval_seconds,
        flag_seconds=settings.anomaly_flag_seconds,
        score_threshold=settings.anomaly_score_threshold,
        deviation_threshold=settings.anomaly_deviation_threshold,
        tenant_minimum=settings.anomaly_tenant_minimum,
        sample_minimum=settings.anomaly_sample_minimum,
        tenant_limit=settings.anomaly_tenant_limit,
    )


def placer_of(
    settings: Settings,
    table: ReplicaTable,
    weights: Weights,
    random_index: Callable[[int], int] = random.randrange,
) -> Placer:
    """What chooses replicas, by these settings."""
    return Placer(
        table,
        weights,
        alternative_count=settings.alternative_count,
        policy=Policy(settings.placement_policy),
        random_index=random_index,
        breaker_terms=BreakerTerms(
            failure_limit=settings.breaker_failure_limit,
            slow_limit=settings.breaker_slow_limit,
            slow_quantile=settings.breaker_slow_quantile,
            slow_factor=settings.breaker_slow_factor,
            open_seconds=settings.breaker_open_seconds,
            probe_limit=settings.breaker_probe_limit,
        ),
        slow_start_seconds=settings.slow_start_seconds,
        prefix_memory_blocks=settings.prefix_memory_blocks,
        start_share=settings.start_share,
        batch_start_share=settings.batch_start_share,
    )


def lane_floors(settings: Settings) -> Floors:
    """What each class but the most urgent one gets at least, by these settings."""
    return {ServiceClass.STANDARD: settings.standard_floor, ServiceClass.BATCH: settings.batch_floor}


def lane_limits(settings: Settings) -> dict[ServiceClass, LaneLimits]:
    """The bounds of the lanes, by these settings."""
    request_limits = {
        ServiceClass.REALTIME: settings.realtime_request_limit,
        ServiceClass.STANDARD: settings.standard_request_limit,
        ServiceClass.BATCH: settings.batch_request_limit,
    }
    return {
        service_class: LaneLimits(
            request_limit, settings.lane_token_limit, settings.lane_byte_limit, settings.tenant_share
        )
        for service_class, request_limit in request_limits.items()
    }
