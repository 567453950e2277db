"""Brings what waits and what is free together. Pure; seconds are monotonic.

Invariant: after `match`, either nothing waits or no ready replica has a credit to spend.
"""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.scheduler.forecast import DrainRate, WorkRates, expected_wait
from tidegate.scheduler.lanes import Lanes, Waiting
from tidegate.scheduler.placement import Placement, Weights, choose, order
from tidegate.scheduler.replica_table import Replica, ReplicaTable
from tidegate.scheduler.request import ServiceClass


class Dispatcher:
    """Lanes on one side, credits on the other.

    Args:
        weights: of the placement score.
        alternative_count: how many next best replicas a placement names.
        work: counts what leaves the lanes in cost, as `drain` does in requests.
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
    ) -> None:
        self.lanes = lanes
        self.table = table
        self.drain = drain
        self._work = work
        self._weights = weights
        self._alternative_count = alternative_count
        self._dispatch_count = 0

    def can_dispatch(self, now: float) -> bool:
        """Whether a request that came now would be dispatched at once."""
        return self.lanes.next is None and self._has_credit(self.table.ready(now), now)

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
        replica = self.table.get(placement.address)
        if replica is not None:
            replica.book.put_back(placement.credit_id)

    def expected_wait(self, waiting: Waiting, now: float, *, position: int | None = None) -> float | None:
        """Seconds until a waiting request leaves, by the measured rate; None when that is not known.

        Args:
            position: of the request, where the caller knows it; to find it takes time.
        """
        return expected_wait(position or self.lanes.position(waiting), self.drain.rate(now))

    def _note_backlog(self, now: float) -> None:
        self.drain.set_backlog(len(self.lanes) > 0, now)
        if self._work is not None:
            self._work.set_backlog((one for one in ServiceClass if len(self.lanes.lane(one))), now)

    def _place(self, waiting: Waiting, now: float) -> Placement | None:
        ready = self.table.ready(now)
        if not self._has_credit(ready, now):
            return None
        ordered = order(ready, self._weights, waiting.answer_token_count)
        chosen = choose(ordered, now)
        assert chosen is not None
        self._dispatch_count += 1
        chosen.dispatch_number = self._dispatch_count
        alternatives = [replica.address for replica in ordered if replica is not chosen]
        return Placement(chosen.address, chosen.book.spend(now), tuple(alternatives[: self._alternative_count]))

    @staticmethod
    def _has_credit(replicas: Iterable[Replica], now: float) -> bool:
        return any(replica.book.can_spend(now) for replica in replicas)
