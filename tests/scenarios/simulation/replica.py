"""A replica: the production's credit ledger and load figures around a simulated engine.

This is what `model/slots.py` and `model/replica_servicer.py` do with futures and streams. Whether a request starts,
waits or is refused, and who gets how many credits, is the ledger's decision, on the service's own terms; how many slots
there are, and credits ahead of them, is what `model/engine_watch.py` makes of the engine's load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from simulation.engine import EngineSpec, FluidEngine, Generation
from simulation.job import End, Job
from simulation.simulator import Event, Simulator
from tidegate.common.errors import TidegateError
from tidegate.model.__main__ import credit_terms
from tidegate.model.capacity import Capacity
from tidegate.model.config import Settings
from tidegate.model.credits import Admitted, CreditLedger, Decision, Granted, Revoked, Spent, Urgency
from tidegate.model.engine_watch import EngineWatch
from tidegate.model.load import ReplicaLoad
from tidegate.model.look_ahead import LookAhead
from tidegate.model.triton_messages import EngineLoad
from tidegate.v1 import replica_pb2

SETTINGS: Final = Settings(model_path="simulated")

OUTCOMES: Final = {
    End.COMPLETED: replica_pb2.REQUEST_OUTCOME_COMPLETED,
    End.LEFT: replica_pb2.REQUEST_OUTCOME_CANCELLED,
    End.EXPIRED: replica_pb2.REQUEST_OUTCOME_DEADLINE_EXCEEDED,
    End.FAILED: replica_pb2.REQUEST_OUTCOME_FAILED,
}


@dataclass(slots=True, eq=False)
class Session:
    """One scheduler's credit stream, seen from here; `tell` delivers a message after the network's delay."""

    key: int
    tell: Callable[[replica_pb2.ReplicaMessage], None]
    arrived: list[str] = field(default_factory=list)
    """Credits with which requests came since the last load."""


@dataclass(slots=True, eq=False)
class _Held:
    job: Job
    arrived_at: float
    spent: Spent | None = None
    generation: Generation | None = None
    is_starting: bool = False


class SimulatedReplica:
    """One replica.

    Args:
        on_first_token, on_end: called when the client would see it.
        queue_limit: of requests without a credit; None for the production's default.
        load_interval_seconds: the longest time between two loads, as a sign of life.
    """

    def __init__(
        self,
        simulator: Simulator,
        address: str,
        spec: EngineSpec,
        *,
        on_first_token: Callable[[Job], None],
        on_end: Callable[[Job, End, str], None],
        engine_class: Callable[..., Any] = FluidEngine,
        queue_limit: int | None = None,
        load_interval_seconds: float = 1.0,
    ) -> None:
        self.address = address
        settings = SETTINGS if queue_limit is None else msgspec.structs.replace(SETTINGS, queue_limit=queue_limit)
        self.ledger = CreditLedger(credit_terms(settings), id_prefix=address)
        self.load = ReplicaLoad(address, "simulated", 2**17, lambda: self.engine.load(), simulator.clock)
        self.load.slots = self  # type: ignore[assignment]  # It reads the ledger of it, and who is starting.
        self.load.capacity = Capacity(settings.tpot_target_seconds)
        self.load.look_ahead = LookAhead(settings.credit_ahead_limit, simulator.now)
        self.ready = False
        """Whether its engine is there."""
        # This replica is its Triton and its slots; what it does with time is not needed here.
        self._watch = EngineWatch(
            self, self, self.load, None, slot_limit=settings.slot_limit, set_serving=None,
            poll_seconds=settings.load_poll_seconds,
        )  # fmt: skip
        self.engine = engine_class(simulator, spec, lambda: self._watch.take_load(self.latest_load))
        self.starting_count = 0
        """Requests that have a slot and no token yet, as the slots count them."""
        self.attempt_count = 0
        """Requests that the engine began."""
        self._simulator = simulator
        self._on_first_token = on_first_token
        self._on_end = on_end
        self._keys = itertools.count(1)
        self._lives = itertools.count(1)
        self._sessions: dict[int, Session] = {}
        self._held: dict[int, _Held] = {}
        self._key_of: dict[Job, int] = {}
        self._timer: Event | None = None
        self._load_timer: Event | None = None
        self._told_at = -load_interval_seconds
        self._load_interval_seconds = load_interval_seconds
        self.set_ready(True)

    @property
    def latest_load(self) -> EngineLoad:
        """What the engine says of itself."""
        load: EngineLoad = self.engine.load()
        return load

    @property
    def busy_count(self) -> int:
        """Requests that run or wait here."""
        return len(self._held)

    def jobs(self) -> Iterator[Job]:
        """All that run or wait here."""
        return (held.job for held in self._held.values())

    def set_ready(self, ready: bool) -> None:
        """The engine comes, or goes away with all that ran in it."""
        self.ready = ready
        self._watch.take_ready(ready)
        self._tell_load_soon()

    def fail_waiting(self, error: TidegateError) -> None:
        """The engine went away, and what ran in it with what waited for it."""
        for key in list(self._held):
            self._finish(key, End.FAILED, error.reason.name)

    def set_capacity(self, slot_count: int, *, can_start: bool, ahead: int) -> None:
        """What the engine watch makes of the engine's load."""
        self.ledger.set_capacity(slot_count, can_start=can_start, ahead=ahead)
        self._update()

    def connect(self, tell: Callable[[replica_pb2.ReplicaMessage], None]) -> Session:
        """A scheduler's stream is open."""
        session = Session(next(self._keys), tell)
        tell(replica_pb2.ReplicaMessage(load=self._snapshot()))
        self._sessions[session.key] = session
        self.ledger.connect(session.key)
        self._update()
        return session

    def disconnect(self, session: Session) -> None:
        """A scheduler's stream has ended."""
        del self._sessions[session.key]
        self.ledger.disconnect(session.key)
        self._update()

    def hear(self, session: Session, message: replica_pb2.SchedulerMessage) -> None:
        """A scheduler said something."""
        if session.key not in self._sessions:
            return
        match message.WhichOneof("message"):
            case "demand":
                demand = message.demand
                self.ledger.set_demand(session.key, demand.waiting_request_count, demand.realtime_request_count)
            case "give_back":
                self.ledger.give_back(session.key, message.give_back.credit_ids)
        self._update()

    def take(self, job: Job, credit_id: str) -> str:
        """A request arrives; the word of a refusal, or empty."""
        if not self.ready:
            return "REPLICA_UNAVAILABLE"
        now = self._simulator.now
        key = next(self._keys)
        decision = self.ledger.take(key, credit_id, resumed=False, now=now, urgency=Urgency(job.engine_priority))
        if decision is Decision.REFUSE:
            return "SERVER_IS_OVERLOADED"
        job.reached_replica_at, job.replica, job.replica_address = now, self, self.address
        self._held[key] = _Held(job, now)
        self._key_of[job] = key
        if decision is Decision.START:
            self._start(key)
        self._update()
        return ""

    def leave(self, job: Job, end: End) -> None:
        """The client of a request left, or gave up."""
        if job in self._key_of:
            self._finish(self._key_of[job], end, "")

    def _start(self, key: int) -> None:
        held = self._held[key]
        held.spent = self.ledger.spent_by(key)
        if held.spent is not None and held.spent.gap_seconds is not None:
            self.load.look_ahead.add_gap(held.spent.gap_seconds, self._simulator.now)
        if held.spent is not None and held.spent.session in self._sessions:
            self._sessions[held.spent.session].arrived.append(held.spent.credit_id)
        self.attempt_count += 1
        self.starting_count += 1
        held.is_starting = True
        job = held.job
        held.generation = Generation(
            job.prompt_token_count,
            min(job.answer_token_count, job.max_tokens),
            job.engine_priority,
            on_first_token=lambda: self._begin(held),
            on_end=lambda: self._finish(key, End.COMPLETED, ""),
        )
        self.engine.start(held.generation)

    def _started(self, held: _Held) -> None:
        if held.is_starting:
            held.is_starting = False
            self.starting_count -= 1
            self._tell_load_soon()

    def _begin(self, held: _Held) -> None:
        self._started(held)
        self.load.add_first_token(self._simulator.now - held.arrived_at)
        self.load.add_tokens(1, None)
        held.job.first_token_at = self._simulator.now
        self._on_first_token(held.job)

    def _finish(self, key: int, end: End, reason: str) -> None:
        held = self._held.pop(key)
        self._started(held)
        job = held.job
        del self._key_of[job]
        if held.generation is not None:
            self.engine.cancel(held.generation)
            job.prefilled_token_count += round(held.generation.prefilled_token_count)
            job.generated_token_count += round(held.generation.generated_token_count)
            self.load.look_ahead.add_turnover(self._simulator.now)
        if end is End.COMPLETED:
            self.load.add_need(job.token_count)
        self.load.add_request(failed=end is End.FAILED)
        self.ledger.release(key)
        self._report(held, end)
        job.replica = None
        self._update()
        self._on_end(job, end, reason)

    def _report(self, held: _Held, end: End) -> None:
        session = None if held.spent is None else self._sessions.get(held.spent.session)
        if session is None:
            return
        assert held.spent is not None
        job = held.job
        outcome = replica_pb2.Outcome(
            request_id=job.job_id,
            credit_id=held.spent.credit_id,
            outcome=OUTCOMES[end],
            prompt_token_count=job.prompt_token_count,
            completion_token_count=job.generated_token_count,
            paused=held.spent.was_paused,
        )
        if job.first_token_at is not None:
            outcome.time_to_first_token.FromNanoseconds(int((job.first_token_at - held.arrived_at) * 1e9))
        outcome.duration.FromNanoseconds(int((self._simulator.now - held.arrived_at) * 1e9))
        session.tell(replica_pb2.ReplicaMessage(outcome=outcome))

    def _update(self) -> None:
        """Delivers what the ledger decided after a change, as the slots do."""
        now = self._simulator.now
        started = []
        for action in self.ledger.settle(now):
            match action:
                case Admitted(key):
                    started.append(key)
                case Granted(key, credit_ids, lease_seconds, preempting):
                    grant = replica_pb2.Grant(credit_ids=credit_ids, preempting=preempting)
                    grant.lease.FromNanoseconds(int(lease_seconds * 1e9))
                    self._sessions[key].tell(replica_pb2.ReplicaMessage(grant=grant))
                case Revoked(key, credit_ids):
                    revoke = replica_pb2.CreditIds(credit_ids=credit_ids)
                    self._sessions[key].tell(replica_pb2.ReplicaMessage(revoke=revoke))
        self._wake_when_due(now)
        self._tell_load_soon()
        for key in started:
            self._start(key)

    def _wake_when_due(self, now: float) -> None:
        seconds = self.ledger.next_event_seconds(now)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._simulator.after(seconds, self._update)

    def _tell_load_soon(self) -> None:
        """A changed load is told at the earliest after the interval that the servicer keeps."""
        due = max(self._simulator.now, self._told_at + SETTINGS.load_report_seconds)
        if self._load_timer is not None:
            if self._load_timer.at <= due:
                return
            self._load_timer.cancel()
        self._load_timer = self._simulator.at(due, self._tell_load)

    def _tell_load(self) -> None:
        self._told_at = self._simulator.now
        self._load_timer = self._simulator.after(self._load_interval_seconds, self._tell_load)
        load = self._snapshot()
        for session in self._sessions.values():
            message = replica_pb2.ReplicaMessage(load=load)
            message.load.arrived_credit_ids.extend(session.arrived)
            session.arrived.clear()
            session.tell(message)

    def _snapshot(self) -> replica_pb2.Load:
        token_count, gap_seconds = self.engine.take_decoded()
        if token_count:
            # One average of all streams: the mean gap, as often as there were tokens.
            self.load.add_tokens(token_count, gap_seconds)
        return self.load.snapshot()
