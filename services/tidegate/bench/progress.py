"""How far a run is, on stderr: one line a second, in place on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

from tidegate.bench.sender import Progress

LINE_SECONDS: Final = 1.0


class ProgressLine:
    """Writes the line.

    Args:
        name: of the run.
        duration_seconds: of the plan.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        duration_seconds: float,
        *,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._duration_seconds = duration_seconds
        self._stream = stream
        self._clock = clock
        self._began_at: float | None = None
        self._said_at = 0.0
        self._said = Progress()
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        """Says it, if a second has passed."""
        now = self._clock()
        if self._began_at is None:
            self._began_at = self._said_at = now
        seconds = now - self._said_at
        if seconds < LINE_SECONDS:
            return
        text = line(self._name, now - self._began_at, self._duration_seconds, self._said, progress, seconds)
        self._said, self._said_at = progress, now
        if self._stream.isatty():
            # Shorter lines must not leave the end of longer ones standing.
            self._stream.write(f"\r{text:<{self._width}}")
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Leaves the line."""
        if self._stream.isatty() and self._width:
            self._stream.write("\n")


def line(name: str, elapsed: float, duration: float, before: Progress, now: Progress, seconds: float) -> str:
    """One line: rates since the line before."""

    def rate(outcome: str) -> float:
        return (now.outcomes.get(outcome, 0) - before.outcomes.get(outcome, 0)) / seconds

    others = sum(now.outcomes.values()) - now.outcomes.get("in_time", 0) - now.outcomes.get("refused", 0)
    lag = f"  behind by {1000 * now.lag_seconds:.0f} ms" if now.lag_seconds > 0.05 else ""
    return (
        f"{name}  {min(elapsed, duration):4.0f}/{duration:.0f} s  sent {(now.sent - before.sent) / seconds:6.1f}/s"
        f"  in flight {now.in_flight:5d}  in time {rate('in_time'):6.1f}/s  refused {rate('refused'):6.1f}/s"
        f"  other {others}{lag}"
    )
