"""What the overload benchmark reads from a ledger's columns beside the usual figures. Pure."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tidegate.bench.columns import Columns
from tidegate.bench.ledger import Outcome

STEP_SECONDS: Final = 0.25
"""How finely a recovery is told."""

CALM_REQUESTS: Final = 5
"""So many requests in a row must be as usual."""


def admitted_ttft(columns: Columns) -> NDArray[np.float64]:
    """The times to first token of what was not refused, late or not; seconds.

    One that was given up before its first token counts with the time until then, so that it is not left out.
    """
    given_up = columns.of(Outcome.DEADLINE_EXCEEDED) & np.isnan(columns.ttft)
    seconds = np.where(given_up, columns.ended - columns.planned, columns.ttft)
    return seconds[~columns.of(Outcome.REFUSED) & ~np.isnan(seconds)]


def recovery_seconds(columns: Columns, load_ended: float, *, usual: float) -> float:
    """After the end of a load, how long until requests that come are in time and have a first token as usual.

    From then on it stays so: one in five may be slower, no more. Infinite where the last few are not as usual.

    Args:
        usual: seconds to a first token that all but a few requests had in calm times.
    """
    rows = np.argsort(columns.planned)
    rows = rows[columns.planned[rows] >= load_ended]
    good = (columns.of(Outcome.IN_TIME) & (columns.ttft <= usual))[rows]
    back = math.inf
    for place in reversed(range(len(rows) - CALM_REQUESTS + 1)):
        if good[place : place + CALM_REQUESTS].sum() < CALM_REQUESTS - 1:
            break
        back = max(0.0, float(columns.planned[rows[place]]) - load_ended)
    return back


def seconds_to_rate(columns: Columns, moment: float, share: float) -> float:
    """From a moment on, how long until this share of the requests planned within a second is in time."""
    begin = moment
    while begin < float(columns.planned.max(initial=0.0)):
        inside = (columns.planned >= begin) & (columns.planned < begin + 1.0)
        if inside.any() and float(columns.of(Outcome.IN_TIME)[inside].mean()) >= share:
            return begin - moment
        begin += STEP_SECONDS
    return math.inf


def cost_shares(columns: Columns, begin: float, end: float) -> dict[str, float]:
    """What each tenant got of all tokens of answers that ended in a time."""
    inside = (columns.ended >= begin) & (columns.ended < end)
    total = max(1, int(columns.tokens[inside].sum()))
    return {
        str(tenant): float(columns.tokens[inside & (columns.tenant == tenant)].sum()) / total
        for tenant in sorted(set(columns.tenant))
    }
