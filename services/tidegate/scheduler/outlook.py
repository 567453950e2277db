"""What is to be expected for one more request: its wait, its time on a replica, and how hard the mesh is pressed. Pure.

It brings together what waits (lanes), what leaves (work rates), what came back (observations), what arrives, and what
replicas say of themselves.
"""

from __future__ import annotations

from typing import Final

from tidegate.scheduler.fair_shares import FairShares
from tidegate.scheduler.forecast import Arrivals, WorkRates, expected_wait
from tidegate.scheduler.lanes import Lanes
from tidegate.scheduler.observations import Average, Observations
from tidegate.scheduler.replica_table import ReplicaTable
from tidegate.scheduler.request import ServiceClass

IDLE_SHARE: Final = 0.1
"""Where more come than can be served, so many of the slots wait for a request that is decided about just now."""


class Outlook:
    """The expectations of one scheduler; seconds are monotonic, cost is in tokens (see `observations.cost_of`)."""

    def __init__(self, lanes: Lanes, table: ReplicaTable, work: WorkRates, observations: Observations) -> None:
        self._lanes = lanes
        self._table = table
        self._work = work
        self._observations = observations
        self._arrivals = {one: Arrivals() for one in ServiceClass}
        self._expected_per_slot = Average()
        self.shares = {one: FairShares(lanes.weight_of) for one in ServiceClass}

    def ask(self, service_class: ServiceClass, tenant: str, cost: float, now: float) -> None:
        """A request came, whatever becomes of it."""
        self._arrivals[service_class].count(cost, now)
        self.shares[service_class].ask(tenant, cost, now)

    def expect(self, cost: float, answer_token_count: int, now: float) -> None:
        """A request came that will cost so much: what replicas say of their speed then tells what a slot can serve."""
        seconds = self.service_seconds(answer_token_count, now)
        if seconds > 0:
            self._expected_per_slot.add(cost / seconds)

    def capacity(self, now: float) -> float | None:
        """Cost per second that can be served: as measured while something waited, else by slots and times of answers.

        Before enough answers have ended it is what these are expected to take. None when nothing is known.
        """
        measured = self._work.rate(now)
        if measured is not None:
            return measured
        per_slot = self._observations.cost_per_second_of_a_slot
        if per_slot is None:
            per_slot = self._expected_per_slot.value
        return None if per_slot is None else per_slot * self.slot_count(now)

    def slot_count(self, now: float) -> int:
        """Requests that the ready replicas run at once."""
        return sum(replica.load.slot_count for replica in self._table.ready(now) if replica.load is not None)

    def has_idle_slots(self, now: float) -> bool:
        """Whether more of them have nothing to do than the few that have just become free."""
        return self._table.credit_count > max(1.0, IDLE_SHARE * self.slot_count(now))

    def lane_capacity(self, service_class: ServiceClass, now: float) -> float | None:
        """The same for one class, with what the others take; None when not known."""
        measured = self._work.lane_rate(service_class, now)
        return self.capacity(now) if measured is None else measured

    def pressure(self, service_class: ServiceClass, now: float) -> float:
        """How many times of what can be served arrives of a class and those more urgent; 1 where that is not known."""
        capacity = self.capacity(now)
        if capacity is None:
            return 1.0
        left = self._left(service_class, capacity, now)
        return sum(arrivals.pressure(left, now) for one, arrivals in self._arrivals.items() if one <= service_class)

    def _left(self, service_class: ServiceClass, capacity: float, now: float) -> float:
        """Of the capacity what the floors of less urgent classes leave, as far as those ask for them."""
        taken = 0.0
        for one, arrivals in self._arrivals.items():
            if one > service_class:
                floor = self._lanes.floor(one)
                taken += floor if len(self._lanes.lane(one)) else min(floor, arrivals.pressure(capacity, now))
        return capacity * (1 - taken)

    def lull_seconds(self, service_class: ServiceClass, now: float) -> float:
        """For how long nothing may come of a class, as it was of late."""
        return self._arrivals[service_class].lull_seconds(now)

    def wait_seconds(self, service_class: ServiceClass, tenant: str, cost: float, now: float) -> float | None:
        """How long one more request would wait; None when not known."""
        before = self._lanes.cost_before(service_class, tenant, cost)
        is_urgent = service_class is ServiceClass.REALTIME
        capacity = self.capacity(now)
        # While no replica is there, how long one may be away is the grace's to say.
        if capacity and not self._table.has_credit(now, urgent=is_urgent):
            # The first in line waits, too, until one that runs has ended.
            before += self._observations.usual_cost or 0.0
        if before <= 0:
            return 0.0
        wait = _seconds(before, capacity and self._left(service_class, capacity, now))
        own_rate = self._work.lane_rate(service_class, now)
        if own_rate is not None and any(len(self._lanes.lane(one)) for one in ServiceClass if one < service_class):
            # More urgent requests come meanwhile, too: what the lane itself was left with tells how many.
            own = _seconds(self._lanes.lane(service_class).cost_before(tenant, cost), own_rate)
            wait = own if wait is None or own is None else max(wait, own)
        by_floor = _seconds(self._lanes.floor_cost(service_class, tenant, cost), capacity)
        return wait if wait is None or by_floor is None else min(wait, by_floor)

    def service_seconds(self, answer_token_count: int, now: float) -> float:
        """How long an answer of this length takes on a replica; 0 when nothing is known."""
        loads = [replica.load for replica in self._table.ready(now) if replica.load is not None]
        if not loads:
            return self._observations.service_seconds(answer_token_count, now)
        said = sum(
            load.time_to_first_token_seconds + answer_token_count * load.seconds_per_output_token for load in loads
        )
        return max(self._observations.service_seconds(answer_token_count, now), said / len(loads))


def _seconds(cost: float, rate: float | None) -> float | None:
    """Cost is not counted in whole requests, but waits for it are as long."""
    if rate is None:
        return None
    return cost / rate if rate > 0 else expected_wait(1, 0.0)
