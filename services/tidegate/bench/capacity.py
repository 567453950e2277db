"""Finds C, the highest rate at which 99 % of the requests meet their deadline. Pure: `calibrate.py` does the runs.

First a closed loop, with more and more users until that does not complete more: a rate above what it completes cannot
last, even if a short run hides that in a queue. Then open-loop runs at rates below it: away from the guess in small
steps until one rate holds and one does not, then halving the gap until it is small.
"""

from __future__ import annotations

from typing import Final

REQUIRED_SHARE: Final = 0.99
"""Of the requests must be in time for a rate to hold."""

PRECISION: Final = 0.04
"""The search ends when the lowest rate that failed is within this of the highest that held."""

GUESS_SHARE: Final = 0.9
"""Of the closed loop's rate is tried first: random arrivals need some room."""

STEP: Final = 1.25
"""Between two rates while none has held."""

RUN_LIMIT: Final = 16
"""Runs after which the search gives what it has."""


class CapacitySearch:
    """Asks for rates and is told how they went.

    Args:
        ceiling: requests per second that a closed loop completes, above 0.
    """

    def __init__(self, ceiling: float) -> None:
        self._held = 0.0
        self._failed = ceiling * (1 + PRECISION)
        self._next = GUESS_SHARE * ceiling
        self.run_count = 0

    @property
    def is_done(self) -> bool:
        """Whether the answer is known well enough."""
        return self.run_count >= RUN_LIMIT or (self._held > 0 and self._failed <= self._held * (1 + PRECISION))

    @property
    def capacity(self) -> float:
        """The highest rate that held; 0 where none did."""
        return self._held

    @property
    def next_rate(self) -> float:
        """The rate to try."""
        return self._next

    def observe(self, rate: float, in_time_share: float) -> None:
        """Takes the outcome of a run at a rate."""
        self.run_count += 1
        if in_time_share >= REQUIRED_SHARE:
            self._held = max(self._held, rate)
        else:
            self._failed = min(self._failed, rate)
        if self._failed <= self._held:
            # Two runs that contradict each other: chance at the edge. The lower word counts.
            self._held = self._failed / STEP
        # Far from the edge the steps grow; near it the gap is halved.
        self._next = (self._held * self._failed) ** 0.5 if self._held else self._failed / STEP**self.run_count
