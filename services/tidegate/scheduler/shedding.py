"""What share of each class the mesh still lets through to the scheduler, when more comes than it can decide. Pure.

Everything else here decides about requests one by one, and each decision costs processor time. Past that, Envoy
refuses at random, by class, before the scheduler is asked; this says how much. It goes by how long requests have been
under way when the scheduler first sees them, and when a replica does: in a burst that grows and ends, in an overload it
stays (the argument of CoDel, Nichols and Jacobson, ACM Queue 2012, for queues of packets). How much is too long follows
from the time that clients give: each of these waits is one of several in a mesh that is short of processors.

What the scheduler refuses anyway may as well be refused before. So a crowd that makes a few of them wait is reason
enough to refuse that, and no more: `KEPT_FACTOR` times of what is accepted of each class still gets through. Where all
are late, as much is kept of the most urgent class alone. What is much too late cannot be decided in time, and then
nothing is kept.

Invariants: but for the floors of others the most urgent class is the last to lose anything; no class is shut out
entirely, so that what comes can still be seen; a share that nothing speaks for any more grows back to 1 by itself.
Times are seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tidegate.common.lateness import Lateness
from tidegate.scheduler.lanes import NO_FLOORS, Floors
from tidegate.scheduler.request import ServiceClass

Shares = Mapping[ServiceClass, float]

LATE_SHARE: Final = 0.005
"""What is looked at later than this share of its client's time is late."""

TOO_LATE_SHARE: Final = 0.1
"""And this is much too late."""

KEPT_FACTOR: Final = 2.0
"""How many times of what is accepted of a class gets through while nothing is much too late."""

SHORTEST_LATE_SECONDS: Final = 0.05
"""Nothing is late before; a busy event loop is as late now and then."""

SOON_LATE_SECONDS: Final = 0.015
"""What is looked at later than this is reason enough to refuse what would be refused anyway; above the least delay of
the last minutes, for the clocks of two hosts may differ by as much."""

SOON_LATE_RUN: Final = 6
"""So many that are, one after the other: a crowd at the processors is over before an interval is."""

SOON_LATE_FEWEST: Final = 40
"""And so many in these intervals, where nothing is refused yet: of a burst of fewer, little is decided by the time that
it is late, and that is no sign that it will be refused."""

DRAIN_FACTOR: Final = 5.0
"""What has piled up is to be decided in so many times of what is late."""

LATE_INTERVALS: Final = 3
"""What replicas say of themselves counts when it was so for so many intervals, one after the other."""

RATE_INTERVALS: Final = 10
"""What can be done is what was done in so many intervals; fewer are a matter of chance."""

FEWEST_REQUESTS: Final = 8
"""Fewer than this in these intervals prove nothing, and cost nothing."""

SMALLEST_SHARE: Final = 0.02
"""What is let through of a class that is refused otherwise."""

USED_SHARE: Final = 0.9
"""How much of what can be decided is let through: what waits already must be decided, too."""

RECOVERY_FACTOR: Final = 1.4
"""By how much the share of a class grows in an interval in which nothing of it came."""

NEWEST_WEIGHT: Final = 0.2
"""What the newest interval counts in the rate at which requests come."""

PROBE_FACTOR: Final = 1.005
"""By how much the decisions that are held possible grow in an interval that was not late, to find out whether there can
be more."""

IDLE_PROBE_FACTOR: Final = 1.0003
"""The same while more of them would only refuse more."""

RETURN_FACTOR: Final = 1.05
"""The same while they are well below what was possible before it was last too much."""

RETURN_SHARE: Final = 0.9
"""Well below: less than this share of it."""

FALL_FACTOR: Final = 0.7
"""By how much they fall at most in an interval that was late: in it, few may have come, or others had the processor."""

FASTEST_ARRIVAL_FACTOR: Final = 100.0
"""How much faster requests can have come than they were looked at; a bound on what is read from a few of them."""

LONGEST_DELAY_SECONDS: Final = 60.0
"""A longer delay is the clocks of two hosts that differ."""


@dataclass(slots=True)
class _Interval:
    """What was seen in one interval; `offered` counts those that were refused on the way, too, as far as known."""

    seconds: float = 0.0
    count: int = 0
    offered: dict[ServiceClass, float] = field(default_factory=lambda: dict.fromkeys(ServiceClass, 0.0))
    shortest_delay_seconds: float = float("inf")
    longest_late_run: int = 0
    """Of requests that were looked at a little late, one after the other."""
    late_seconds: float = 0.0
    """After how long it was late, of all that were seen, added up."""
    too_late_seconds: float = 0.0
    accepted: dict[ServiceClass, int] = field(default_factory=lambda: dict.fromkeys(ServiceClass, 0))
    first_arrival: float = float("inf")
    last_arrival: float = float("-inf")
    ended_count: int = 0
    replicas_late_seconds: float = 0.0


class Shedder:
    """Looks at requests as they come, and says anew after each interval what is let through.

    Args:
        late_seconds: what comes later than this, all through an interval, is more than can be decided, whatever time
            clients give.
        drain_seconds: in this time, at most, what has piled up is to be decided.
        floors: of what can be decided, what a class gets at least of which as much comes.
    """

    def __init__(self, *, late_seconds: float, drain_seconds: float, now: float, floors: Floors = NO_FLOORS) -> None:
        self._floors = floors
        self._late_seconds = late_seconds
        self._drain_seconds = drain_seconds
        self._interval = _Interval()
        self._began_at = now
        self._intervals: deque[_Interval] = deque(maxlen=RATE_INTERVALS)
        self._usual_late_seconds = late_seconds
        self._usual_too_late_seconds = late_seconds
        self._decidable_rate = 0.0
        self._last_too_much = 0.0
        self._lateness = Lateness()
        self._late_run = 0
        self._is_restricting = False
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

    def see(self, service_class: ServiceClass, arrived_at: float, now: float, given_seconds: float | None) -> float:
        """A request is looked at for the first time. Returns how many like it came, those refused on the way included.

        Args:
            arrived_at: when it reached the mesh.
            given_seconds: how long its client waits for the answer; None: as long as it takes.
        """
        interval = self._interval
        interval.count += 1
        interval.late_seconds += self._late_after(given_seconds, LATE_SHARE)
        interval.too_late_seconds += self._late_after(given_seconds, TOO_LATE_SHARE)
        delay = now - arrived_at
        if not 0 <= delay <= LONGEST_DELAY_SECONDS:
            return 1.0
        offered_count = 1 / self._shares_at(arrived_at)[service_class]
        interval.offered[service_class] += offered_count
        interval.shortest_delay_seconds = min(interval.shortest_delay_seconds, delay)
        is_soon_late = self._lateness.of(delay, now) > SOON_LATE_SECONDS
        self._late_run = self._late_run + 1 if is_soon_late else 0
        interval.longest_late_run = max(interval.longest_late_run, self._late_run)
        interval.first_arrival = min(interval.first_arrival, arrived_at)
        interval.last_arrival = max(interval.last_arrival, arrived_at)
        return offered_count

    def accept(self, service_class: ServiceClass) -> None:
        """A request will be answered."""
        self._interval.accepted[service_class] += 1

    def see_end(self) -> None:
        """A request ended on a replica."""
        self._interval.ended_count += 1

    def end_interval(self, now: float, replicas_late_seconds: float = 0.0) -> bool:
        """Sets the shares by what was seen since the last call; whether they have changed.

        Args:
            replicas_late_seconds: how late replicas look at what is sent to them, the soonest of them.
        """
        interval, self._interval = self._interval, _Interval()
        interval.seconds, self._began_at = now - self._began_at, now
        if interval.seconds <= 0:
            return False
        interval.replicas_late_seconds = replicas_late_seconds
        self._intervals.append(interval)
        before = self.shares
        if interval.count:
            self._usual_late_seconds = interval.late_seconds / interval.count
            self._usual_too_late_seconds = interval.too_late_seconds / interval.count
        seen = [(one.count, one.shortest_delay_seconds) for one in self._intervals]
        ended = [(one.ended_count, one.replicas_late_seconds) for one in self._intervals]
        is_late = self._is_late(seen, 1, self._usual_late_seconds)
        is_crowd = self.is_shedding or sum(count for count, _ in seen) >= SOON_LATE_FEWEST
        if is_late or (is_crowd and interval.longest_late_run >= SOON_LATE_RUN):
            # They came in another time than they were looked at in, shorter as a rule.
            arrival_seconds = max(
                interval.last_arrival - interval.first_arrival, interval.seconds / FASTEST_ARRIVAL_FACTOR
            )
            rates = self._smoothed(interval, arrival_seconds)
            piled_up = sum(
                rates[one] * shares[one] * (end - begin)
                for begin, end, shares in self._since(interval.last_arrival, now)
                for one in ServiceClass
            )
            rate, kept = self._rate([one.count for one in self._intervals]), self._kept()
            if self._is_late(seen, 1, self._usual_too_late_seconds):
                self._restrict(rate, piled_up, self._usual_too_late_seconds, rates, {}, now)
            elif is_late:
                most_urgent = dict(list(kept.items())[:1])
                self._restrict(rate, piled_up, self._usual_late_seconds, rates, most_urgent, now)
            else:
                if self.is_shedding:
                    # What was decided is not what can be in time. How much less that is, only falling can tell.
                    rate = sum(rates[one] * min(share, self.shares[one]) for one, share in kept.items()) / USED_SHARE
                self._restrict(rate, piled_up, SOON_LATE_SECONDS, rates, kept, now)
        elif self._is_late(ended, LATE_INTERVALS, self._usual_too_late_seconds):
            rate = self._rate([one.ended_count for one in self._intervals])
            piled_up = rate * replicas_late_seconds
            rates = self._smoothed(interval, interval.seconds)
            self._restrict(rate, piled_up, self._usual_too_late_seconds, rates, {}, now)
        elif self.is_shedding:
            self._relax(interval, now)
        return self.shares != before

    def _is_late(self, seen: Sequence[tuple[int, float]], interval_count: int, late_seconds: float) -> bool:
        """Whether all were late that were seen in the last intervals, and whether there were enough to say so."""
        newest = seen[-interval_count:]
        return (
            len(newest) == interval_count
            and sum(count for count, _ in seen) >= FEWEST_REQUESTS
            and all(count and late_seconds < shortest < float("inf") for count, shortest in newest)
        )

    def _kept(self) -> Shares:
        """What is to get through of each class of which anything came, the most urgent first."""
        kept: dict[ServiceClass, float] = {}
        for one in ServiceClass:
            offered = sum(interval.offered[one] for interval in self._intervals)
            if offered > 0:
                accepted = sum(interval.accepted[one] for interval in self._intervals)
                kept[one] = KEPT_FACTOR * accepted / offered
        return kept

    def _rate(self, counts: Iterable[int]) -> float:
        return sum(counts) / sum(one.seconds for one in self._intervals)

    def _restrict(
        self,
        rate: float,
        piled_up: float,
        late_seconds: float,
        rates: Mapping[ServiceClass, float],
        kept: Shares,
        now: float,
    ) -> None:
        """More comes than can be done: what was done in this time is what can be.

        Args:
            rate: requests per second that were done, where they pile up.
            piled_up: how many there are.
            late_seconds: after which they are late.
            rates: how many come a second, refused ones included.
            kept: the least that gets through of a class, if as much did before.
        """
        if not self._is_restricting:
            self._last_too_much = self._decidable_rate
        self._is_restricting = True
        least = FALL_FACTOR * self._decidable_rate if self.is_shedding else 0.0
        self._decidable_rate = max(rate, least)
        self._rates = rates
        drain_seconds = min(self._drain_seconds, DRAIN_FACTOR * late_seconds)
        self._allot(max(0.0, USED_SHARE * self._decidable_rate - piled_up / drain_seconds), rates, kept, now)

    def _relax(self, interval: _Interval, now: float) -> None:
        """Nothing was late: somewhat more may come, up to what is known to be possible."""
        self._is_restricting = False
        self._rates = self._smoothed(interval, interval.seconds)
        if all(self.shares[one] >= min(1.0, share) for one, share in self._kept().items()):
            self._decidable_rate *= IDLE_PROBE_FACTOR
        elif self._decidable_rate < RETURN_SHARE * self._last_too_much:
            self._decidable_rate *= RETURN_FACTOR
        else:
            self._decidable_rate *= PROBE_FACTOR
        self._allot(USED_SHARE * self._decidable_rate, self._rates, {}, now)

    def _late_after(self, given_seconds: float | None, share: float) -> float:
        if given_seconds is None:
            return self._late_seconds
        return min(self._late_seconds, max(SHORTEST_LATE_SECONDS, share * given_seconds))

    def _smoothed(self, interval: _Interval, seconds: float) -> Mapping[ServiceClass, float]:
        """How many of each class come a second, refused ones included."""
        newest = {one: offered / seconds for one, offered in interval.offered.items()}
        if not self.is_shedding:
            return newest
        return {one: rate + NEWEST_WEIGHT * (newest[one] - rate) for one, rate in self._rates.items()}

    def _allot(self, budget: float, rates: Mapping[ServiceClass, float], kept: Shares, now: float) -> None:
        """Divides so many requests a second between the classes, of which so many come, the most urgent first, when
        each has its floor of them."""
        # Where what is accepted of the most urgent class is kept although all are late, so are the floors.
        whole = USED_SHARE * self._decidable_rate if kept else budget
        floors = {one: min(rates[one], self._floors.get(one, 0.0) * whole) for one in ServiceClass}
        budget = max(0.0, budget - sum(floors.values()))
        shares = {}
        for service_class in ServiceClass:
            rate = rates[service_class]
            budget += floors[service_class]
            # Of a class of which nothing came, nothing is known: it recovers like one for which nothing speaks.
            wanted = budget / rate if rate > 0 else self.shares[service_class] * RECOVERY_FACTOR
            least = min(kept.get(service_class, 0.0), self.shares[service_class])
            shares[service_class] = min(1.0, max(SMALLEST_SHARE, wanted, least))
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
