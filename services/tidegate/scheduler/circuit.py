"""Leaves out a dependency that fails, for a while. Pure; seconds are monotonic."""

from __future__ import annotations


class Circuit:
    """Closed while the dependency answers; open for a pause after some failures in a row.

    After the pause one call may try; its failure opens the circuit again at once.
    """

    def __init__(self, failure_limit: int, pause_seconds: float) -> None:
        self._failure_limit = failure_limit
        self._pause_seconds = pause_seconds
        self._failure_count = 0
        self._open_until = 0.0
        self.last_error = ""

    def is_open(self, now: float) -> bool:
        """Whether the dependency is left out now."""
        return now < self._open_until

    def succeed(self) -> None:
        """It answered."""
        self._failure_count = 0
        self.last_error = ""

    def fail(self, error: str, now: float) -> None:
        """It did not answer."""
        self._failure_count += 1
        self.last_error = error
        if self._failure_count >= self._failure_limit:
            self._open_until = now + self._pause_seconds
