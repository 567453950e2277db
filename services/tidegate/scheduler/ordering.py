"""In what order the requests of one tenant leave its queue: policies by name. Pure.

Each policy is a key, given once when a request begins to wait; the smallest leaves first, and of equal ones the
oldest. Ageing needs no clock: all that wait grow older alike, so what counts is when each began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tidegate.scheduler.lanes import Waiting

RETRY_SECONDS: Final = 0.1
"""What one earlier try counts in `wfq`, in seconds of expected time."""

AGEING: Final = 0.1
"""What a second of waiting counts in `srpt`: ten seconds outweigh one second of expected time."""

Order = Callable[["Waiting"], float]


def fcfs(waiting: Waiting) -> float:
    """First come, first served."""
    return waiting.since


def wfq(waiting: Waiting) -> float:
    """Priority is 1 / (expected time + 0.1 s for each earlier try): the largest leaves first."""
    return waiting.expected_seconds + RETRY_SECONDS * waiting.retry_count


def edf(waiting: Waiting) -> float:
    """The earliest deadline first."""
    return waiting.deadline


def srpt(waiting: Waiting) -> float:
    """The shortest expected time first, with ageing."""
    return waiting.expected_seconds + AGEING * waiting.since


ORDERS: Final[Mapping[str, Order]] = {"fcfs": fcfs, "wfq": wfq, "edf": edf, "srpt": srpt}
