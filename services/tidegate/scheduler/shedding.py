"""What share of each class the mesh still lets through to the scheduler, when more comes than it can decide. Pure.

Everything else here decides about requests one by one, and each decision costs processor time. Past that, Envoy
refuses at random, by class, before the scheduler is asked; this says how much. It goes by how long requests have been
under way when the scheduler first sees them: in a burst that grows and ends, in an overload it stays (the argument of
CoDel, Nichols and Jacobson, ACM Queue 2012, for queues of packets).

Invariants: the most urgent class is the last to lose anything; no class is shut out entirely, so that what comes can
still be seen; a share that nothing speaks for any more grows back to 1 by itself. Times are seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from tidegate.scheduler.request import ServiceClass

Shares = Mapping[ServiceClass, float]

SMALLEST_SHARE: Final = 0.02
"""What is let through of a class that is refused otherwise."""

USED_SHARE: Final = 0.9
"""How much of what can be decided is let through: what waits already must be decided, too."""

RECOVERY_FACTOR: Final = 1.4
"""By how much the shares grow in an interval in which nothing was late."""

NEWEST_WEIGHT: Final = 0.2
"""What the newest interval counts in the rate at which requests come."""

PROBE_FACTOR: Final = 1.005
"""By how much the decisions that are held possible grow in such an interval, to find out whether there can be more."""

FASTEST_ARRIVAL_FACTOR: Final = 100.0
"""How much faster requests can have come than they were looked at; a bound on what is read from a few of them."""

LONGEST_DELAY_SECONDS: Final = 60.0
"""A longer delay is the clocks of two hosts that differ."""


@dataclass(slots=True)
class _Interval:
    """What was seen in one interval; `offered` counts those that were refused on the way, too, as far as known."""

    count: int = 0
    offered: dict[ServiceClass, float] = field(default_factory=lambda: dict.fromkeys(ServiceClass, 0.0))
    shortest_delay_seconds: float = float("inf")
    first_arrival: float = float("inf")
    last_arrival: float = float("-inf")


class Shedder:
    """Looks at requests as they come, and says anew after each interval what is let through.

    Args:
        late_seconds: what comes later than this, all through an interval, is more than can be decided.
        drain_seconds: in this time what has piled up is to be decided.
    """

    def __init__(self, *, late_seconds: float, drain_seconds: float, now: float) -> None:
        self._late_seconds = late_seconds
        self._drain_seconds = drain_seconds
        self._interval = _Interval()
        self._began_at = now
        self._decidable_rate = 0.0
        self._rates: Mapping[ServiceClass, float] = {}
        self._past: deque[tuple[float, Shares]] = deque([(now, dict.fromkeys(ServiceClass, 1.0))])

    @property
    def shares(self) -> Shares:
        """What is let through of each class, 1 is all."""
        return self._past[-1][1]

    @property
    def is_shedding(self) -> bool:
        """Whether anything is refused."""
        return any(share < 1 for share in self.shares.values())

    def see(self, service_class: ServiceClass, arrived_at: float, now: float) -> None:
        """A request is looked at for the first time.

        Args:
            arrived_at: when it reached the mesh.
        """
        interval = self._interval
        interval.count += 1
        delay = now - arrived_at
        if not 0 <= delay <= LONGEST_DELAY_SECONDS:
            return
        interval.offered[service_class] += 1 / self._shares_at(arrived_at)[service_class]
        interval.shortest_delay_seconds = min(interval.shortest_delay_seconds, delay)
        interval.first_arrival = min(interval.first_arrival, arrived_at)
        interval.last_arrival = max(interval.last_arrival, arrived_at)

    def end_interval(self, now: float) -> bool:
        """Sets the shares by what was seen since the last call; whether they have changed."""
        interval, self._interval = self._interval, _Interval()
        seconds, self._began_at = now - self._began_at, now
        if seconds <= 0:
            return False
        before = self.shares
        if self._late_seconds < interval.shortest_delay_seconds < float("inf"):
            self._restrict(interval, seconds, now)
        elif self.is_shedding:
            self._relax(interval, seconds, now)
        return self.shares != before

    def _restrict(self, interval: _Interval, seconds: float, now: float) -> None:
        """More comes than can be decided: what was decided in this time is what can be."""
        self._decidable_rate = interval.count / seconds
        # They came in another time than they were looked at in, shorter as a rule.
        arrival_seconds = max(interval.last_arrival - interval.first_arrival, seconds / FASTEST_ARRIVAL_FACTOR)
        rates = self._rates = self._smoothed(interval, arrival_seconds)
        piled_up = sum(
            rates[one] * shares[one] * (end - begin)
            for begin, end, shares in self._since(interval.last_arrival, now)
            for one in ServiceClass
        )
        self._allot(max(0.0, USED_SHARE * self._decidable_rate - piled_up / self._drain_seconds), rates, now)

    def _relax(self, interval: _Interval, seconds: float, now: float) -> None:
        """Nothing was late: somewhat more may come, up to what is known to be possible."""
        self._decidable_rate *= PROBE_FACTOR
        rate, bound = interval.count / seconds, USED_SHARE * self._decidable_rate
        if rate * RECOVERY_FACTOR < bound:
            # Far from the bound: let all shares grow, or those of a load that has ended would stay.
            self._set({one: min(1.0, share * RECOVERY_FACTOR) for one, share in self.shares.items()}, now)
        else:
            self._rates = self._smoothed(interval, seconds)
            self._allot(bound, self._rates, now)

    def _smoothed(self, interval: _Interval, seconds: float) -> Mapping[ServiceClass, float]:
        """How many of each class come a second, refused ones included."""
        newest = {one: offered / seconds for one, offered in interval.offered.items()}
        if not self.is_shedding:
            return newest
        return {one: rate + NEWEST_WEIGHT * (newest[one] - rate) for one, rate in self._rates.items()}

    def _allot(self, budget: float, rates: Mapping[ServiceClass, float], now: float) -> None:
        """Divides so many requests a second between the classes, of which so many come, the most urgent first."""
        shares = {}
        for service_class in ServiceClass:
            rate = rates[service_class]
            # Of a class of which nothing came, nothing is known: it recovers like one for which nothing speaks.
            wanted = budget / rate if rate > 0 else self.shares[service_class] * RECOVERY_FACTOR
            shares[service_class] = min(1.0, max(SMALLEST_SHARE, wanted))
            budget = max(0.0, budget - rate * shares[service_class])
        self._set(shares, now)

    def _set(self, shares: Shares, now: float) -> None:
        if shares != self.shares:
            self._past.append((now, shares))
        while len(self._past) > 1 and self._past[1][0] < now - LONGEST_DELAY_SECONDS:
            self._past.popleft()

    def _shares_at(self, moment: float) -> Shares:
        """What was let through then. Most requests are young, so the newest are looked at first."""
        for began_at, shares in reversed(self._past):
            if began_at <= moment:
                return shares
        return self._past[0][1]

    def _since(self, moment: float, now: float) -> Iterator[tuple[float, float, Shares]]:
        """Begin, end and shares of each time with the same shares, from a moment until now, the last one first."""
        end = now
        for began_at, shares in reversed(self._past):
            if end <= moment:
                return
            yield max(began_at, moment), end, shares
            end = began_at
