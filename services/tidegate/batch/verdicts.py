"""What a failed attempt at a line means: again later, again a few times, or the line has failed. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from tidegate.common.errors import Reason, TidegateError


class Verdict(enum.Enum):
    """What becomes of the line."""

    WAIT = enum.auto()
    """There was no room; nobody sends for a while, and the line is tried again however often it takes."""
    WAIT_TENANT = enum.auto()
    """The tenant's own rate is used up; its lines wait."""
    AGAIN = enum.auto()
    """It went wrong, and may go right another time; the attempts are counted."""
    FAILED = enum.auto()
    """It would go wrong each time."""


_VERDICTS: Final = {
    Reason.SERVER_IS_OVERLOADED: Verdict.WAIT,
    Reason.REPLICA_UNAVAILABLE: Verdict.WAIT,
    Reason.RATE_LIMIT_EXCEEDED: Verdict.WAIT_TENANT,
    Reason.DEADLINE_EXCEEDED: Verdict.AGAIN,
    Reason.CANCELLED: Verdict.AGAIN,
    Reason.NUMERICAL_ERROR: Verdict.AGAIN,
    Reason.INTERNAL_ERROR: Verdict.AGAIN,
}
"""All other reasons speak of the request itself."""


def verdict(error: TidegateError, attempt_count: int, attempt_limit: int) -> Verdict:
    """What the error of an attempt means.

    Args:
        attempt_count: of the line so far, this one included; those without room are not counted.
    """
    found = _VERDICTS.get(error.reason, Verdict.FAILED)
    return Verdict.FAILED if found is Verdict.AGAIN and attempt_count >= attempt_limit else found


@dataclass(slots=True)
class Pauses:
    """How long to wait after a refusal: what it says, and at least a time that doubles with each in a row."""

    shortest_seconds: float
    longest_seconds: float
    _in_row: int = 0

    def next_seconds(self, retry_after_seconds: float | None) -> float:
        """The pause after one more refusal."""
        backoff = self.shortest_seconds * 2.0 ** min(self._in_row, 20)
        self._in_row += 1
        return min(self.longest_seconds, max(backoff, retry_after_seconds or 0.0))

    def reset(self) -> None:
        """An attempt found room."""
        self._in_row = 0
