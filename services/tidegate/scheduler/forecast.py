"""How long a queue will take: the measured drain rate. Pure; seconds are monotonic."""

from __future__ import annotations

from typing import Final

FEWEST_DISPATCHES: Final = 5
"""A rate from fewer dispatches than these is not known."""

SHORTEST_BACKLOG_SECONDS: Final = 0.5
"""Nor is one from a shorter backlog."""

LONGEST_MEMORY_SECONDS: Final = 60.0
"""A rate measured longer ago says nothing about the capacity of now."""


class DrainRate:
    """Requests dispatched per second while something waits.

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

    def count_dispatch(self, now: float) -> None:
        """One request left the queue; counts only while there is a backlog."""
        self._advance(now)
        if self._backlog:
            self._dispatches += 1.0
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


def expected_wait(request_count_before: int, rate: float | None) -> float | None:
    """Seconds until so many requests have left; None when the rate is not known, infinite when nothing leaves."""
    if rate is None:
        return None
    if request_count_before == 0:
        return 0.0
    return request_count_before / rate if rate > 0 else float("inf")
