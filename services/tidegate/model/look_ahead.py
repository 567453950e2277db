"""How many credits may stand above the slots, so that a slot does not stand empty between two requests. Pure.

A slot that is freed stays empty while its credit travels to a scheduler, and a request from there to the engine; and
the engine takes it up at its next step only. By Little's law the slots that stand empty so are, on average,

    turnovers per second * idle seconds of each.

As many requests may wait in the engine itself, where the next step finds them. More would only move the queue from
the scheduler, which orders it, to the engine. Time is an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

import math
from typing import Final

from tidegate.model.moving_averages import MovingAverage, MovingRate

HALF_LIFE_SECONDS: Final = 5.0

WORTH_SHARE: Final = 0.05
"""Where less of the slots than this stands empty, nothing is promised ahead: who waits in the engine waits for a slot
there, and that is worth less than its first token's time."""

LARGEST_SHARE: Final = 0.25
"""Of the slots, whatever is measured; one is always allowed."""


class LookAhead:
    """Measures the turnover and the gap.

    Args:
        limit: the most credits ahead; 0 switches it off.
    """

    def __init__(self, limit: int, now: float) -> None:
        self._limit = limit
        self._turnover = MovingRate(HALF_LIFE_SECONDS, now)
        self._gap = MovingAverage(HALF_LIFE_SECONDS)
        self._gap_seconds: float | None = None

    @property
    def gap_seconds(self) -> float | None:
        """From a freed slot's credit to the request that spent it, as measured last; None before the first."""
        return self._gap_seconds

    def add_turnover(self, now: float) -> None:
        """A slot was freed."""
        self._turnover.add(1, now)

    def add_gap(self, seconds: float, now: float) -> None:
        """A credit, for which requests waited, was spent so long after it was granted."""
        self._gap.add(seconds, 1, now)
        self._gap_seconds = self._gap.value(now)

    def ahead(self, slot_count: int, step_seconds: float | None, now: float) -> int:
        """The credits that may stand above the slots.

        Args:
            step_seconds: of one engine step, for what comes during one waits for the next; None: not known.
        """
        if self._gap_seconds is None or slot_count <= 0:
            return 0
        idle_seconds = self._gap_seconds
        if step_seconds:
            idle_seconds = max(1, math.ceil(idle_seconds / step_seconds)) * step_seconds
        empty_count = self._turnover.per_second(now) * idle_seconds
        if empty_count < slot_count * WORTH_SHARE:
            return 0
        return min(self._limit, max(1, int(slot_count * LARGEST_SHARE)), math.ceil(empty_count))
