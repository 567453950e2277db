"""Simulated time: a heap of events, a clock that jumps from one to the next, and one seeded source of randomness.

Invariants: time never goes back; events of one moment happen in the order in which they were made, so that a run is a
function of its seed alone.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any


class Event:
    """Something that will happen; `cancel` makes it not happen."""

    __slots__ = ("_call", "at")

    def __init__(self, at: float, call: Callable[[], Any]) -> None:
        self.at = at
        self._call: Callable[[], Any] | None = call

    def cancel(self) -> None:
        """Takes it back; it may have happened already."""
        self._call = None

    def happen(self) -> None:
        """Does what it is for, once."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Simulator:
    """The event loop.

    Args:
        seed: of everything random in the run.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.event_count = 0
        self._heap: list[tuple[float, int, Event]] = []
        self._made_count = 0

    def clock(self) -> float:
        """Simulated seconds since the start, as the production's modules ask for them."""
        return self.now

    def at(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Event:
        """Calls at this time, or now if that is over."""
        event = Event(max(seconds, self.now), (lambda: call(*arguments)) if arguments else call)
        self._made_count += 1
        heapq.heappush(self._heap, (event.at, self._made_count, event))
        return event

    def after(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Event:
        """Calls so many seconds from now."""
        return self.at(self.now + seconds, call, *arguments)

    def every(self, seconds: float, call: Callable[[], Any]) -> None:
        """Calls again and again, for as long as the run lasts."""

        def again() -> None:
            call()
            self.after(seconds, again)

        self.after(seconds, again)

    def run_until(self, seconds: float) -> None:
        """Lets everything up to this time happen."""
        while self._heap and self._heap[0][0] <= seconds:
            at, _, event = heapq.heappop(self._heap)
            self.now = at
            self.event_count += 1
            event.happen()
        self.now = max(self.now, seconds)
