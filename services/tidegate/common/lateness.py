"""How late something is looked at, by two clocks that need not agree. Pure; seconds of one monotonic clock."""

from __future__ import annotations

from typing import Final

CLOCK_WINDOW_SECONDS: Final = 300.0
"""In so long, one request at least is looked at without delay: what it took is the difference of the clocks."""


class WindowedMinimum:
    """The least value of the last seconds.

    Args:
        window_seconds: values are forgotten after this, and after half of it at the earliest.
    """

    def __init__(self, window_seconds: float) -> None:
        self._half_seconds = window_seconds / 2
        self._begin = float("-inf")
        self._before: float | None = None
        self._newest: float | None = None

    def add(self, value: float, now: float) -> None:
        """Takes a value."""
        self._turn(now)
        self._newest = value if self._newest is None else min(self._newest, value)

    def value(self, now: float) -> float | None:
        """The least; None where none came."""
        self._turn(now)
        values = [value for value in (self._before, self._newest) if value is not None]
        return min(values, default=None)

    def _turn(self, now: float) -> None:
        age = now - self._begin
        if age < self._half_seconds:
            return
        self._before = self._newest if age < 2 * self._half_seconds else None
        self._newest = None
        self._begin = now


class Lateness:
    """Turns delays between two clocks into lateness, which is above the least delay of the last minutes."""

    def __init__(self) -> None:
        self._least = WindowedMinimum(CLOCK_WINDOW_SECONDS)

    def of(self, delay_seconds: float, now: float) -> float:
        """The lateness of what was delayed so much; the delay may be negative."""
        self._least.add(delay_seconds, now)
        least = self._least.value(now)
        assert least is not None
        return delay_seconds - least
