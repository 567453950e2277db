"""What clients do after a no: the three kinds of client that a mesh meets. Pure."""

from __future__ import annotations

from typing import Final

from tidegate.bench.flows import RetryPolicy
from tidegate.bench.ledger import Attempt, Ending

NAIVE_RETRIES: Final = 3
"""Retries, at once, of a client that knows nothing better."""

OBEDIENT_RETRIES: Final = 5
"""Retries of a client that comes back when it was told to."""

_WORTH_ANOTHER: Final = frozenset({Ending.REFUSED, Ending.FAILED, Ending.DEADLINE_EXCEEDED})


def next_delay(policy: RetryPolicy, last: Attempt, made: int, remaining_seconds: float) -> float | None:
    """How long to wait before another attempt; None for no other.

    Args:
        last: the attempt that ended.
        made: attempts so far, that one included.
        remaining_seconds: what is left of the client's patience with the whole request.
    """
    if policy == "naive":
        return 0.0 if last.ending in _WORTH_ANOTHER and made <= NAIVE_RETRIES else None
    if policy == "obedient" and last.ending is Ending.REFUSED and made <= OBEDIENT_RETRIES:
        wait = last.retry_after_seconds
        return wait if wait is not None and wait < remaining_seconds else None
    return None


def attempt_patience(policy: RetryPolicy, made: int, waits_seconds: float, remaining_seconds: float) -> float:
    """How long the next attempt may take: a naive client starts anew each time, the others do not."""
    return waits_seconds if policy == "naive" and made else remaining_seconds
