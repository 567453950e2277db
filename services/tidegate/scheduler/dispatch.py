"""Brings what waits and what is free together. Pure; seconds are monotonic.

Invariant: after `match`, either nothing waits or no candidate has a credit that what is next may spend.
"""

from __future__ import annotations

from tidegate.scheduler.forecast import DrainRate, expected_wait
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
        placer: Placer | None = None,
    ) -> None:
        self.lanes = lanes
        self.table = table
        self.drain = drain
        self.placer = placer or Placer(table, weights, alternative_count=alternative_count)

    def can_dispatch(self, now: float) -> bool:
        """Whether a request that came now would be dispatched at once."""
        return self.lanes.next is None and self.placer.can_place(now)

    def add(self, waiting: Waiting) -> None:
        """Lets a request wait; the caller then calls `match`."""
        self.lanes.add(waiting)

    def match(self, now: float) -> list[tuple[Waiting, Placement]]:
        """Takes from the lanes whatever a credit is there for, in order, and says where each goes."""
        matched = []
        while (waiting := self.lanes.next) is not None:
            placement = self._place(waiting, now)
            if placement is None:
                break
            self.lanes.remove(waiting)
            self.drain.count_dispatch(now)
            matched.append((waiting, placement))
        self.drain.set_backlog(self.lanes.next is not None, now)
        return matched

    def leave(self, waiting: Waiting, now: float) -> None:
        """Takes a request out that will not be dispatched: its client left, or its deadline passed."""
        self.lanes.remove(waiting)
        self.drain.set_backlog(self.lanes.next is not None, now)

    def put_back(self, placement: Placement) -> None:
        """Takes back the credit of a request that was placed and not sent; the caller then calls `match`."""
        self.placer.put_back(placement)

    def expected_wait(self, waiting: Waiting, now: float) -> float | None:
        """Seconds until a waiting request leaves, by the measured rate; None when that is not known."""
        return expected_wait(self.lanes.position(waiting), self.drain.rate(now))

    def _place(self, waiting: Waiting, now: float) -> Placement | None:
        urgent = waiting.service_class is ServiceClass.REALTIME
        return self.placer.place(waiting.answer_token_count, now, urgent=urgent, block_hashes=waiting.block_hashes)
