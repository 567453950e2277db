"""A scheduler: the production's dispatcher, admission and credit streams, with simulated time around them.

This is what `scheduler/service.py`, `pipeline.py` and `queue.py` do with tasks, futures and gRPC. Every decision is
made by the modules that they call; here is only when each is asked, and how long a message takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from simulation.job import Job
from simulation.replica import Session, SimulatedReplica
from simulation.simulator import Event, Simulator
from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError
from tidegate.scheduler.admission import Admission, Conditions, deadline_passed
from tidegate.scheduler.config import Settings
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.forecast import DrainRate, WorkRates
from tidegate.scheduler.lanes import LaneLimits, Lanes, Waiting
from tidegate.scheduler.placement import Placement, Weights
from tidegate.scheduler.queue import waiting_of
from tidegate.scheduler.queue_status import QueueStatuses
from tidegate.scheduler.replica_table import Replica, ReplicaTable
from tidegate.scheduler.replicas import CreditStream, ended, note_outcome
from tidegate.scheduler.request import Request, ServiceClass, request_from_headers
from tidegate.scheduler.service import expectations_of, lane_floors, lane_limits, placer_of, signs_of
from tidegate.v1 import replica_pb2

PREPARE_SECONDS: Final = 0.003
"""From a request's headers to its tokens: the body, and preprocess."""

BODY_BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class Delays:
    """How long a message is on its way, one way; seconds."""

    credit_seconds: float = 0.001
    hop_seconds: float = 0.001
    reconnect_seconds: float = 0.1


class SimulatedStream:
    """The credit stream to one replica: the production's reader, and a writer that keeps its interval."""

    def __init__(
        self, simulator: Simulator, stream: CreditStream, replica: SimulatedReplica, lanes: Lanes, delays: Delays,
        demand_interval_seconds: float,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.session: Session | None = None
        self._simulator = simulator
        self._replica = replica
        self._lanes = lanes
        self._delays = delays
        self._interval_seconds = demand_interval_seconds
        self._written_at = -demand_interval_seconds
        self._timer: Event | None = None
        self._told: tuple[int, int, int] | None = None

    def open(self) -> None:
        """Connects; the replica's first load is on its way."""
        self._told = None
        self.session = self._replica.connect(self._deliver)
        self.changed()

    def close(self) -> None:
        """The stream breaks: its credits are the replica's again."""
        session, self.session = self.session, None
        if session is not None:
            self._replica.disconnect(session)
            self.stream._disconnect("closed")

    def changed(self) -> None:
        """What waits, or what is to be given back, has changed; it is told when the interval is over."""
        if self._timer is None and self.session is not None:
            self._timer = self._simulator.at(self._written_at + self._interval_seconds, self._write)

    def _deliver(self, message: replica_pb2.ReplicaMessage) -> None:
        self._simulator.after(self._delays.credit_seconds, self._hear, message, self.session)

    def _hear(self, message: replica_pb2.ReplicaMessage, session: Session | None) -> None:
        # The first load is sent before there is a session.
        if self.session is None or session not in (None, self.session):
            return
        self.stream._receive(message)
        if message.HasField("revoke"):
            self.changed()

    def _write(self) -> None:
        self._timer = None
        if self.session is None:
            return
        messages = []
        if given_back := self.stream._give_back:
            self.stream._give_back = []
            messages.append(replica_pb2.SchedulerMessage(give_back=replica_pb2.CreditIds(credit_ids=given_back)))
        demand = (len(self._lanes), self._lanes.token_count, len(self._lanes.lane(ServiceClass.REALTIME)))
        if demand != self._told:
            self._told = demand
            told = replica_pb2.Demand(
                waiting_request_count=demand[0], waiting_token_count=demand[1], realtime_request_count=demand[2]
            )
            messages.append(replica_pb2.SchedulerMessage(demand=told))
        for message in messages:
            self._written_at = self._simulator.now
            self._simulator.after(self._delays.credit_seconds, self._replica.hear, self.session, message)


class SimulatedScheduler:
    """One scheduler.

    Args:
        asks_for_places: whether each request that has to wait asks where it stands, once and at once.
        on_refused: a request ends here, with the error that its client is told.
        on_dispatched: a request goes to a replica.
    """

    def __init__(
        self,
        simulator: Simulator,
        name: str,
        replicas: Iterable[SimulatedReplica],
        *,
        settings: Settings,
        delays: Delays,
        asks_for_places: bool,
        on_refused: Callable[[Job, TidegateError], None],
        on_dispatched: Callable[[Job, Placement], None],
    ) -> None:
        self.name = name
        self.settings = settings
        self.is_alive = True
        self._simulator = simulator
        self._on_refused = on_refused
        self._on_dispatched = on_dispatched
        self._lanes = Lanes(
            lane_limits(settings),
            floors=lane_floors(settings),
            order=settings.order,
            weights=settings.tenant_weights,
        )
        self.table = ReplicaTable(
            margin_seconds=settings.credit_margin_seconds,
            silence_seconds=settings.replica_silence_seconds,
            now=simulator.now,
        )
        work = WorkRates(settings.drain_half_life_seconds)
        weights = Weights(settings.latency_weight, settings.queue_weight)
        self.dispatcher = Dispatcher(
            self._lanes,
            self.table,
            DrainRate(settings.drain_half_life_seconds),
            weights=weights,
            alternative_count=settings.alternative_count,
            work=work,
            placer=placer_of(settings, self.table, weights, simulator.random.randrange),
        )
        self._asks_for_places = asks_for_places
        self._queue_statuses = QueueStatuses(self.dispatcher, simulator.clock)
        self.expectations = expectations_of(settings, self._lanes, self.table, work, simulator.now)
        self._admission = Admission(
            self._lanes,
            replica_grace_seconds=settings.replica_grace_seconds,
            held_request_limit=settings.held_request_limit,
            default_retry_seconds=settings.default_retry_seconds,
            total_limits=LaneLimits(
                settings.waiting_request_limit, settings.waiting_token_limit, settings.waiting_byte_limit
            ),
            habits=self.expectations.habits,
            brownout=self.expectations.brownout,
        )
        self._jobs: dict[Waiting, tuple[Job, Request, Event]] = {}
        self._waiting: dict[Job, Waiting] = {}
        self._preparing: set[Job] = set()
        by_address = {replica.address: replica for replica in replicas}
        self.table.set_addresses(by_address)
        self.streams = [self._stream(known, by_address[known.address], delays) for known in self.table]
        for stream in self.streams:
            stream.open()
        simulator.every(settings.tick_seconds, self._tick)

    @property
    def waiting_count(self) -> int:
        """Requests in its lanes."""
        return len(self._waiting)

    @property
    def lanes(self) -> Lanes:
        """What waits."""
        return self.dispatcher.lanes

    def arrive(self, job: Job) -> None:
        """A request's headers are here."""
        now = self._simulator.now
        request = request_from_headers(_header_fields(job, now), now)
        refusal = self._admission.refusal_of_headers(request, self._conditions())
        if refusal is not None:
            self.expectations.count_unread(request, now)
            self._on_refused(job, refusal)
            return
        self._preparing.add(job)
        job.scheduler = self
        self._simulator.after(PREPARE_SECONDS, self._prepared, job, request)

    def leave(self, job: Job) -> None:
        """The client of a request that is still here left."""
        self._preparing.discard(job)
        job.scheduler = None
        waiting = self._waiting.pop(job, None)
        if waiting is not None:
            _, _, timer = self._jobs.pop(waiting)
            timer.cancel()
            self.dispatcher.leave(waiting, self._simulator.now)
            self._demand_changed()

    def put_back(self, placement: Placement) -> None:
        """A decision did not reach Envoy: its client had left."""
        self.dispatcher.put_back(placement)
        self.match()

    def die(self) -> list[Job]:
        """It is killed; returns what it held, which Envoy now balances by itself."""
        self.is_alive = False
        held = [*self._preparing, *self._waiting]
        for job in held:
            self.leave(job)
        for stream in self.streams:
            stream.close()
        return held

    def match(self) -> None:
        """Gives the credits in hand to what waits."""
        while self.is_alive and (matched := self.dispatcher.match(self._simulator.now)):
            for waiting, placement in matched:
                self._hand_over(waiting, placement)
            self._demand_changed()

    def _prepared(self, job: Job, request: Request) -> None:
        """The prompt is known: it is admitted and waits, or it is refused."""
        if job not in self._preparing:
            return
        self._preparing.discard(job)
        now = self._simulator.now
        self._complete(job, request)
        refusal = self._admission.refusal(request, self._conditions())
        if refusal is not None:
            job.scheduler = None
            self._on_refused(job, refusal)
            return
        self.expectations.outlook.shares[request.service_class].admit(request.tenant, request.cost)
        job.admitted_at = now
        waiting = waiting_of(request, now)
        timer = self._simulator.at(waiting.deadline, self._expire, waiting, request)
        self._jobs[waiting] = (job, request, timer)
        self._waiting[job] = waiting
        self.dispatcher.add(waiting)
        self.match()
        if job in self._waiting:
            self._demand_changed()
            if self._asks_for_places:
                with self._queue_statuses.following(request, waiting):
                    status = self._queue_statuses.status(request.request_id, request.tenant)
                job.told_wait_seconds = None if status is None else status.expected_wait_seconds

    def _complete(self, job: Job, request: Request) -> None:
        """What the pipeline learns from preprocess, and the deadline that follows from the class."""
        request.body_byte_count = job.prompt_token_count * BODY_BYTES_PER_TOKEN
        request.prompt_token_count = job.prompt_token_count
        request.max_tokens = job.max_tokens
        request.service_class = job.service_class
        self.expectations.expect(request, self._simulator.now)
        self.expectations.count(request, self._simulator.now)
        longest = {
            ServiceClass.REALTIME: self.settings.realtime_deadline_seconds,
            ServiceClass.STANDARD: self.settings.standard_deadline_seconds,
            ServiceClass.BATCH: self.settings.batch_deadline_seconds,
        }
        if request.deadline is None:
            request.deadline = request.arrived_at + longest[request.service_class]
        request.deadline = min(request.deadline, request.arrived_at + self.settings.longest_hold_seconds)

    def _note_outcome(self, replica: Replica, outcome: replica_pb2.Outcome) -> None:
        now = self._simulator.now
        note_outcome(self.dispatcher.placer, replica, outcome, now)
        self.expectations.observations.end(ended(outcome), now)

    def _hand_over(self, waiting: Waiting, placement: Placement) -> None:
        job, request, timer = self._jobs.pop(waiting)
        timer.cancel()
        del self._waiting[job]
        job.scheduler = None
        job.dispatched_at = self._simulator.now
        request.queue_seconds = self._simulator.now - waiting.since
        if self.expectations.brownout.shortens(request.service_class):
            job.max_tokens = min(job.max_tokens, self.settings.brownout_max_tokens)
            job.was_shortened = True
        self.expectations.observations.dispatch(request, placement.credit_id, request.cost)
        self._on_dispatched(job, placement)

    def _expire(self, waiting: Waiting, request: Request) -> None:
        job, _, _ = self._jobs[waiting]
        self.leave(job)
        self._on_refused(job, deadline_passed(request, self._simulator.now))

    def _conditions(self) -> Conditions:
        now = self._simulator.now
        return Conditions(
            now=now,
            drain_rate=self.dispatcher.drain.rate(now),
            absence_seconds=self.table.absence_seconds(now),
            held_request_count=len(self._waiting) + len(self._preparing) + 1,
            random_share=self._simulator.random.random(),
            outlook=self.expectations.outlook,
            lot=self._simulator.random.random(),
        )

    def _tick(self) -> None:
        if not self.is_alive:
            return
        now = self._simulator.now
        self.table.note_presence(now)
        for replica in self.table:
            replica.book.drop_expired(now)
        if self._conditions().absence_seconds > self.settings.replica_absence_limit_seconds:
            for job in list(self._waiting):
                self.leave(job)
                self._on_refused(job, self._admission.no_replica(self._conditions()))
        self.match()
        signs = {one: signs_of(one, self._lanes, self.expectations.observations, now) for one in ServiceClass}
        self.expectations.brownout.look(signs, now, is_idle=self.dispatcher.is_idle)

    def _stream(self, known: Replica, replica: SimulatedReplica, delays: Delays) -> SimulatedStream:
        stream = CreditStream(
            known,
            self.table,
            self._lanes,
            scheduler_id=self.name,
            demand_interval_seconds=self.settings.demand_interval_seconds,
            clock=self._simulator.clock,
            on_credits=self.match,
            on_outcome=self._note_outcome,
        )
        return SimulatedStream(
            self._simulator, stream, replica, self._lanes, delays, self.settings.demand_interval_seconds
        )

    def _demand_changed(self) -> None:
        for stream in self.streams:
            stream.changed()


def _header_fields(job: Job, now: float) -> dict[str, str]:
    fields = {
        ":path": "/tidegate.v1.Inference/Generate",
        "content-type": "application/grpc",
        headers.REQUEST_ID: job.job_id,
        headers.TENANT: job.tenant,
        headers.SERVICE_CLASS: job.service_class.label,
    }
    if job.deadline_seconds is not None:
        left_ms = max(0, round((job.sent_at + job.deadline_seconds - now) * 1000))
        fields["grpc-timeout"] = f"{left_ms}m"
    return fields


DEADLINE_REASON: Final = Reason.DEADLINE_EXCEEDED.name
