"""Brings what waits and what is free together. Pure; seconds are monotonic.

Invariant: after `match`, either nothing waits or no candidate has a credit that what is next may spend.
"""

from __future__ import annotations

from tidegate.scheduler.forecast import DrainRate, WorkRates, expected_wait
from tidegate.scheduler.lanes import Lanes, Waiting
from tidegate.scheduler.placement import Placement, Weights
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.replica_table import ReplicaTable
from tidegate.scheduler.request import ServiceClass


class Dispatcher:
    """Lanes on one side, credits on the other.

    Args:
        weights: of the placement score.
        alternative_count: how many next best replicas a placement names.
        work: counts what leaves the lanes in cost, as `drain` does in requests. What leaves before every slot is taken
            says nothing of how fast they become free, and does not count in its rate of all lanes.
        placer: takes the credits; None: one by these weights.
    """

    def __init__(
        self,
        lanes: Lanes,
        table: ReplicaTable,
        drain: DrainRate,
        *,
        weights: Weights,
        alternative_count: int,
        work: WorkRates | None = None,
        placer: Placer | None = None,
    ) -> None:
        self.lanes = lanes
        self.table = table
        self.drain = drain
        self._work = work
        self._has_been_full = False
        """Whether every slot has been taken since something waits."""
        self.placer = placer or Placer(table, weights, alternative_count=alternative_count)

    def can_dispatch(self, now: float) -> bool:
        """Whether a request that came now would be dispatched at once."""
        return self.lanes.next is None and self.placer.can_place(now)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return self.lanes.next is None and not any(replica.busy_count for replica in self.table)

    def add(self, waiting: Waiting) -> None:
        """Lets a request wait; the caller then calls `match`."""
        self.lanes.add(waiting)

    def match(self, now: float) -> list[tuple[Waiting, Placement]]:
        """Takes from the lanes whatever a credit is there for, in order, and says where each goes."""
        matched = []
        while (found := self._next(now)) is not None:
            waiting, placement = found
            self.lanes.take(waiting)
            self.drain.count_dispatch(now)
            if self._work is not None:
                self._work.count_dispatch(waiting.service_class, waiting.cost, now)
            matched.append((waiting, placement))
        self._note_backlog(now)
        return matched

    def leave(self, waiting: Waiting, now: float) -> None:
        """Takes a request out that will not be dispatched: its client left, or its deadline passed."""
        self.lanes.remove(waiting)
        self._note_backlog(now)

    def put_back(self, placement: Placement) -> None:
        """Takes back the credit of a request that was placed and not sent; the caller then calls `match`."""
        self.placer.put_back(placement)

    def expected_wait(self, waiting: Waiting, now: float, *, position: int | None = None) -> float | None:
        """Seconds until a waiting request leaves, by the measured rate; None when that is not known.

        By cost as soon as such a rate is known: that of requests is too high while slots are filled that nobody freed.
        Of what all lanes are served, more urgent requests that come meanwhile take a part: what the own lane was left
        with of late says how large. Its floor it has whatever comes.

        Args:
            position: of the request, where the caller knows it; to find it takes time.
        """
        position = position or self.lanes.position(waiting)
        urgent, own = self.lanes.cost_until(waiting, position)
        by_count = expected_wait(position, self.drain.rate(now))
        if self._work is None:
            return by_count
        floor = self.lanes.floor(waiting.service_class)
        before = min(urgent + own, own / floor) if floor > 0 else urgent + own
        in_all = expected_wait(before, self._work.rate(now))
        in_lane = expected_wait(own, self._work.lane_rate(waiting.service_class, now))
        return max((wait for wait in (in_all, in_lane) if wait is not None), default=by_count)

    def _note_backlog(self, now: float) -> None:
        self.drain.set_backlog(len(self.lanes) > 0, now)
        if self._work is None:
            return
        waiting = [one for one in ServiceClass if len(self.lanes.lane(one))]
        # Slots that are freed together are used one after the other, as prompts allow; the mesh is no emptier for that.
        self._has_been_full = bool(waiting) and (self._has_been_full or not self.placer.can_place(now))
        self._work.set_backlog(waiting, now, is_full=self._has_been_full)

    def _next(self, now: float) -> tuple[Waiting, Placement] | None:
        """The next one that a credit is there for, and its placement."""
        waiting = self.lanes.next
        if waiting is None:
            return None
        placement = self._place(waiting, now)
        if placement is not None:
            return waiting, placement
        # What is next may not spend the credits that are left; one of another class may.
        for service_class in ServiceClass:
            other = self.lanes.next_of(service_class)
            if other is not None and other is not waiting and (placement := self._place(other, now)) is not None:
                return other, placement
        return None

    def _place(self, waiting: Waiting, now: float) -> Placement | None:
        return self.placer.place(
            waiting.answer_token_count,
            now,
            urgent=waiting.service_class is ServiceClass.REALTIME,
            is_batch=waiting.service_class is ServiceClass.BATCH,
            is_owed=self.lanes.is_owed(waiting),
            block_hashes=waiting.block_hashes,
        )
