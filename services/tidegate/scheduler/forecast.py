"""How long a queue will take: the measured drain rates, and how much more comes than leaves. Pure; seconds are
monotonic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from tidegate.scheduler.request import ServiceClass

FEWEST_DISPATCHES: Final = 5
"""A rate from fewer dispatches than these is not known."""

SHORTEST_BACKLOG_SECONDS: Final = 0.5
"""Nor is one from a shorter backlog."""

LONGEST_MEMORY_SECONDS: Final = 60.0
"""A rate measured longer ago says nothing about the capacity of now."""


SHORT_WINDOW_SECONDS: Final = 0.25
LONG_WINDOW_SECONDS: Final = 1.0
"""What arrives is averaged over both: a flood is seen at once, and chance does not look like one."""

SHORT_WINDOW_DISCOUNT: Final = 1.5
"""What the short window says counts so much less, because chance moves it more."""

LONGEST_LULL_SECONDS: Final = 0.1
"""A pause in what comes is not expected again for longer than this."""


class DrainRate:
    """Requests (or what they cost) dispatched per second while something waits.

    With nothing waiting, the dispatch rate is the arrival rate and says nothing about capacity, so only time
    with a backlog counts. Dispatches and backlog seconds are both forgotten exponentially, and the rate is their
    quotient.

    Args:
        half_life_seconds: after so many seconds of backlog, what was seen before counts half.
    """

    def __init__(self, half_life_seconds: float) -> None:
        self._half_life_seconds = half_life_seconds
        self._backlog = False
        self._seen_until = 0.0
        self._forget()

    def set_backlog(self, backlog: bool, now: float) -> None:
        """Says whether something waits from now on."""
        if backlog and not self._backlog:
            if now - self._seen_until > LONGEST_MEMORY_SECONDS:
                self._forget()
            self._seen_until = now
        self._advance(now)
        self._backlog = backlog

    def count_dispatch(self, now: float, amount: float = 1.0) -> None:
        """One request, of this cost, left the queue; counts only while there is a backlog."""
        self._advance(now)
        if self._backlog:
            self._dispatches += amount
            self._seen_dispatches += 1

    def rate(self, now: float) -> float | None:
        """Requests per second; None when not known. It tends to 0 while nothing leaves."""
        if not self._backlog and now - self._seen_until > LONGEST_MEMORY_SECONDS:
            return None
        dispatches, backlog_seconds = self._decayed(now)
        if self._seen_dispatches < FEWEST_DISPATCHES or backlog_seconds < SHORTEST_BACKLOG_SECONDS:
            return None
        return dispatches / backlog_seconds

    def _forget(self) -> None:
        self._dispatches = 0.0
        self._seen_dispatches = 0
        self._backlog_seconds = 0.0

    def _advance(self, now: float) -> None:
        if self._backlog:
            self._dispatches, self._backlog_seconds = self._decayed(now)
            self._seen_until = now

    def _decayed(self, now: float) -> tuple[float, float]:
        """Dispatches and backlog seconds as they count now."""
        if not self._backlog:
            return self._dispatches, self._backlog_seconds
        passed = now - self._seen_until
        kept = 0.5 ** (passed / self._half_life_seconds)
        return self._dispatches * kept, self._backlog_seconds * kept + passed


class WorkRates:
    """What is dispatched per second while something waits, in cost: of all lanes together, and of each.

    That of all lanes is of the time since every slot was taken: until then, slots are filled and not freed.

    Args:
        half_life_seconds: of each rate.
    """

    def __init__(self, half_life_seconds: float) -> None:
        self._all = DrainRate(half_life_seconds)
        self._lanes = {one: DrainRate(half_life_seconds) for one in ServiceClass}

    def count_dispatch(self, service_class: ServiceClass, cost: float, now: float) -> None:
        """A request of a class left its lane."""
        self._all.count_dispatch(now, cost)
        self._lanes[service_class].count_dispatch(now, cost)

    def set_backlog(self, waiting: Iterable[ServiceClass], now: float, *, is_full: bool = True) -> None:
        """Says of which classes something waits from now on, and whether every slot has been taken since it does."""
        classes = set(waiting)
        self._all.set_backlog(bool(classes) and is_full, now)
        for service_class, rate in self._lanes.items():
            rate.set_backlog(service_class in classes, now)

    def rate(self, now: float) -> float | None:
        """Cost per second of all lanes; None when not known."""
        return self._all.rate(now)

    def lane_rate(self, service_class: ServiceClass, now: float) -> float | None:
        """The same of one lane, while the others took what they took; None when not known."""
        return self._lanes[service_class].rate(now)


class Arrivals:
    """What comes per second, in cost, admitted or not: a fast and a slow exponential average."""

    def __init__(self) -> None:
        self._short = self._long = 0.0
        self._lull = 0.0
        self._at = 0.0

    def count(self, cost: float, now: float) -> None:
        """A request came."""
        self._short, self._long = self._decayed(now)
        self._lull = self.lull_seconds(now)
        self._at = now
        self._short += cost / SHORT_WINDOW_SECONDS
        self._long += cost / LONG_WINDOW_SECONDS

    def pressure(self, capacity: float | None, now: float) -> float:
        """How many times of what can be served comes; 1 where that is not known.

        Args:
            capacity: cost per second.
        """
        if capacity is None or capacity <= 0:
            return 1.0
        short, long = self._decayed(now)
        return max(long, short / SHORT_WINDOW_DISCOUNT) / capacity

    def lull_seconds(self, now: float) -> float:
        """The longest time of late in which nothing came, `LONGEST_LULL_SECONDS` at most; an old one counts less."""
        passed = max(0.0, now - self._at)
        return max(min(passed, LONGEST_LULL_SECONDS), self._lull * math.exp(-passed / LONG_WINDOW_SECONDS))

    def _decayed(self, now: float) -> tuple[float, float]:
        passed = max(0.0, now - self._at)
        return (
            self._short * math.exp(-passed / SHORT_WINDOW_SECONDS),
            self._long * math.exp(-passed / LONG_WINDOW_SECONDS),
        )


def expected_wait(before: float, rate: float | None) -> float | None:
    """Seconds until so many requests (or so much cost) have left; None when the rate is not known, infinite at 0."""
    if rate is None:
        return None
    if before == 0:
        return 0.0
    return before / rate if rate > 0 else float("inf")
