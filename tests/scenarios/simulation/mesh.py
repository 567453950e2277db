"""The whole: replicas, schedulers, Envoy's part between them, and clients who leave, give up and try again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulation.balancers import Balancer
from simulation.engine import EngineSpec, FluidEngine
from simulation.job import End, Job
from simulation.replica import SimulatedReplica
from simulation.scheduler import Delays, SimulatedScheduler
from simulation.simulator import Simulator
from tidegate.common.errors import Reason, TidegateError
from tidegate.scheduler.config import Settings
from tidegate.scheduler.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSpec:
    """What a mesh is made of.

    Args:
        engines: one for each replica.
        scheduler_count: 0: the balancer alone decides.
        balancer: what Envoy does by itself.
        queue_limit: each replica's, of requests without a credit; None for the production's.
        asks_for_places: whether each request that has to wait asks where it stands, once and at once.
        load_interval_seconds: a replica says how it is at least so often; many replicas are simulated faster with more.
    """

    engines: Sequence[EngineSpec] = (EngineSpec(), EngineSpec())
    scheduler_count: int = 1
    settings: Settings = field(default_factory=Settings)
    delays: Delays = field(default_factory=Delays)
    balancer: Callable[[Simulator], Balancer] = Balancer.round_robin
    queue_limit: int | None = None
    engine_class: Callable[..., Any] = FluidEngine
    asks_for_places: bool = False
    load_interval_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Retries:
    """What clients do after a refusal or a failure.

    Args:
        count: how often they try again at most.
        pause_seconds: how long they wait; None: as long as they were told.
    """

    count: int = 0
    pause_seconds: float | None = None


class Mesh:
    """A running mesh. `jobs` are all attempts, in the order of their planned times.

    Args:
        retries: of all clients.
        warm_up_seconds: let pass before anything is asked of it, for streams to open.
    """

    def __init__(
        self, spec: MeshSpec, seed: int, *, retries: Retries = Retries(), warm_up_seconds: float = 2.0
    ) -> None:
        self.spec = spec
        self.simulator = Simulator(seed)
        self.jobs: list[Job] = []
        self._retries = retries
        self._turns = itertools.count()
        self.replicas = [
            SimulatedReplica(
                self.simulator,
                f"10.0.0.{index + 1}:50060",
                engine,
                on_first_token=lambda job: None,
                on_end=self._end_at_replica,
                engine_class=spec.engine_class,
                queue_limit=spec.queue_limit,
                load_interval_seconds=spec.load_interval_seconds,
            )
            for index, engine in enumerate(spec.engines)
        ]
        self.balancer = spec.balancer(self.simulator)
        self._by_address = {replica.address: replica for replica in self.replicas}
        self._in_transit: dict[Job, tuple[SimulatedScheduler, Placement, float]] = {}
        self.schedulers = [
            SimulatedScheduler(
                self.simulator,
                f"scheduler-{index}",
                self.replicas,
                settings=spec.settings,
                delays=spec.delays,
                asks_for_places=spec.asks_for_places,
                on_refused=self._refuse,
                on_dispatched=lambda job, placement, index=index: self._dispatch(
                    self.schedulers[index], job, placement
                ),
            )
            for index in range(spec.scheduler_count)
        ]
        self.simulator.run_until(warm_up_seconds)

    @property
    def now(self) -> float:
        """Simulated seconds."""
        return self.simulator.now

    def play(self, jobs: Iterable[Job]) -> None:
        """Lets clients send these, whose times are in order and not over; an iterator is read as time goes on."""
        remaining = iter(jobs)

        def send_next(job: Job) -> None:
            self._send(job)
            following = next(remaining, None)
            if following is not None:
                self.simulator.at(following.sent_at, send_next, following)

        first = next(remaining, None)
        if first is not None:
            self.simulator.at(first.sent_at, send_next, first)

    def run_for(self, seconds: float) -> None:
        """Lets time pass."""
        self.simulator.run_until(self.now + seconds)

    def run_until(self, seconds: float) -> None:
        """Lets time pass until then."""
        self.simulator.run_until(seconds)

    def kill_scheduler(self, index: int) -> None:
        """Kills one; what it held is balanced by Envoy as soon as that sees its connection closed."""
        for job in self.schedulers[index].die():
            self.simulator.after(self.spec.delays.hop_seconds, self._pass_through, job)

    def _send(self, job: Job) -> None:
        self.jobs.append(job)
        if job.deadline_seconds is not None:
            self.simulator.at(job.sent_at + job.deadline_seconds, self._give_up, job, End.EXPIRED)
        if job.leaves_after_seconds is not None:
            self.simulator.at(job.sent_at + job.leaves_after_seconds, self._give_up, job, End.LEFT)
        self.simulator.after(self.spec.delays.hop_seconds, self._arrive, job)

    def _arrive(self, job: Job) -> None:
        if job.end is not None:
            return
        alive = [scheduler for scheduler in self.schedulers if scheduler.is_alive]
        if alive:
            alive[next(self._turns) % len(alive)].arrive(job)
        else:
            self._pass_through(job)

    def _dispatch(self, scheduler: SimulatedScheduler, job: Job, placement: Placement) -> None:
        job.is_owed = placement.is_owed
        self._in_transit[job] = (scheduler, placement, self.now)
        self.simulator.after(self.spec.delays.hop_seconds, self._reach, job, placement)

    def _reach(self, job: Job, placement: Placement) -> None:
        """A request arrives at the replica that was named, or, where that is away, at the next one."""
        if self._in_transit.pop(job, None) is None:
            return
        self._try_replicas(job, [placement.address, *placement.alternatives], placement.credit_id)

    def _pass_through(self, job: Job) -> None:
        if job.end is not None:
            return
        self._try_replicas(job, [replica.address for replica in self.balancer.order(self.replicas)], "")

    def _try_replicas(self, job: Job, addresses: Sequence[str], credit_id: str) -> None:
        word = "REPLICA_UNAVAILABLE"
        for address in addresses:
            word = self._by_address[address].take(job, credit_id)
            if word != "REPLICA_UNAVAILABLE":
                break
            credit_id = ""
        if word:
            self._finish(job, End.REFUSED, word)

    def _give_up(self, job: Job, end: End) -> None:
        """The client goes; what is done for it anywhere ends as soon as the mesh has heard of it."""
        if job.end is not None:
            return
        self._end(job, end, "")
        self.simulator.after(self.spec.delays.hop_seconds, self._withdraw, job)

    def _withdraw(self, job: Job) -> None:
        if job.scheduler is not None:
            job.scheduler.leave(job)
        elif job in self._in_transit:
            # Envoy had not got the decision yet, or had and did not send: then only the lease brings the credit back.
            scheduler, placement, since = self._in_transit.pop(job)
            if self.now - since < self.spec.delays.hop_seconds / 2 and scheduler.is_alive:
                scheduler.put_back(placement)
        elif job.replica is not None:
            assert job.end is not None
            job.replica.leave(job, job.end)

    def _refuse(self, job: Job, error: TidegateError) -> None:
        end = End.EXPIRED if error.reason is Reason.DEADLINE_EXCEEDED else End.REFUSED
        job.retry_after_seconds = error.retry_after_seconds
        self.simulator.after(self.spec.delays.hop_seconds, self._finish, job, end, error.reason.name)

    def _end_at_replica(self, job: Job, end: End, reason: str) -> None:
        if job.end is None:
            self._finish(job, end, reason)

    def _finish(self, job: Job, end: End, reason: str) -> None:
        if job.end is not None:
            return
        self._end(job, end, reason)
        if end in (End.REFUSED, End.FAILED):
            self._try_again(job)

    def _end(self, job: Job, end: End, reason: str) -> None:
        job.end, job.reason, job.ended_at = end, reason, self.now

    def _try_again(self, job: Job) -> None:
        if job.attempt >= self._retries.count:
            return
        told = job.retry_after_seconds or 1.0
        pause = told if self._retries.pause_seconds is None else self._retries.pause_seconds
        again = Job(
            f"{(job.origin or job).job_id}+{job.attempt + 1}",
            self.now + pause,
            job.prompt_token_count,
            job.answer_token_count,
            job.max_tokens,
            job.tenant,
            job.service_class,
            job.deadline_seconds,
            job.leaves_after_seconds,
            attempt=job.attempt + 1,
            origin=job.origin or job,
        )
        self.simulator.at(again.sent_at, self._send, again)
