"""How much of a new or returned replica's slots may be used: a share that grows. Pure; seconds are monotonic.

A replica that has just come has cold caches and unproven speed. It gets a little at first and all of it after
`seconds`, while there is another that is warm; where all are new there is nothing to spare them for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

FIRST_SHARE: Final = 0.1
"""Where the share begins."""


def share(since: float, seconds: float, now: float) -> float:
    """The share of the slots, from `FIRST_SHARE` to 1.

    Args:
        since: when the replica came, or came back.
        seconds: until it has all; 0: at once.
    """
    if seconds <= 0 or now - since >= seconds:
        return 1.0
    return min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * max(0.0, now - since) / seconds)


def shares(sinces: Sequence[float], seconds: float, now: float) -> list[float]:
    """The shares of replicas that came at these times; 1 for all where none is warm yet."""
    each = [share(since, seconds, now) for since in sinces]
    return each if any(one >= 1 for one in each) else [1.0] * len(each)


def has_room(busy_count: int, slot_count: int, slots_share: float) -> bool:
    """Whether one more request keeps within the share; one at a time is always allowed."""
    return slots_share >= 1 or busy_count < max(1, math.floor(slot_count * slots_share))
