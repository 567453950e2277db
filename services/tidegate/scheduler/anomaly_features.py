"""What is known of each tenant's requests, as numbers that can be compared: one vector a tenant and window. Pure.

Bounds: so many tenants (who asked longest ago is forgotten), so many windows each.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

FEATURES: Final = (
    "arrival_rate",
    "prompt_tokens",
    "answer_tokens",
    "refused_share",
    "abandoned_share",
    "irregularity",
)
"""The names of a vector's numbers. Rates and token counts are logarithms, so that twice is as far from once everywhere;
irregularity is the coefficient of variation of the times between arrivals: 1 for people (Poisson), 0 for a clock."""

COSTLY: Final = FEATURES[:5]
"""Those that hurt others when they are high."""

SPREAD_FLOORS: Final = (0.25, 0.25, 0.25, 0.05, 0.05, 0.2)
"""Deviations are told in spreads (1.4826 times the median absolute deviation), of at least this: tenants that are all
alike would make any difference an enormous one."""

LARGEST_IRREGULARITY: Final = 4.0

COMMON_DEVIATION: Final = 3.0
"""Spreads; ordinary tenants are seldom further from the others."""

Vector = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What is usual: the medians over the tenants, and the spreads about them."""

    middles: Vector
    spreads: Vector

    def deviations(self, vector: Vector) -> Vector:
        """How far each number stands above the median, in spreads."""
        return tuple((v - m) / s for v, m, s in zip(vector, self.middles, self.spreads, strict=True))


@dataclass(slots=True)
class Window:
    """One tenant's requests of one stretch of time."""

    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    request_count: int = 0
    refused_count: int = 0
    abandoned_count: int = 0

    def vector(self, seconds: float) -> Vector:
        """Its features; there is at least one request."""
        count = self.request_count
        return (
            math.log1p(count / seconds),
            math.log1p(statistics.fmean(self.prompt_tokens or [0])),
            math.log1p(statistics.fmean(self.answer_tokens or [0])),
            self.refused_count / count,
            self.abandoned_count / count,
            _irregularity(sorted(self.arrivals)),
        )


class History:
    """The last windows of the tenants.

    Args:
        window_seconds: the length of a window.
        window_limit: windows kept of a tenant.
        request_minimum: a window with fewer requests says nothing.
        request_limit: requests of a window whose details are kept; the others are counted.
    """

    def __init__(
        self,
        *,
        window_seconds: float,
        window_limit: int,
        tenant_limit: int,
        request_minimum: int = 5,
        request_limit: int = 1_000,
    ) -> None:
        self._window_seconds = window_seconds
        self._window_limit = window_limit
        self._tenant_limit = tenant_limit
        self._request_minimum = request_minimum
        self._request_limit = request_limit
        self._began_at: float | None = None
        self._windows: dict[str, Window] = {}
        self._vectors: OrderedDict[str, deque[Vector]] = OrderedDict()

    def add(
        self,
        tenant: str,
        now: float,
        *,
        arrived_at: float,
        prompt_token_count: int,
        answer_token_count: int,
        refused: bool,
        abandoned: bool,
    ) -> None:
        """A request has left the scheduler. Token counts of 0 are not known."""
        self.roll(now)
        window = self._windows.get(tenant)
        if window is None:
            if len(self._windows) >= self._tenant_limit:
                return
            window = self._windows[tenant] = Window()
        window.request_count += 1
        window.refused_count += refused
        window.abandoned_count += abandoned
        if window.request_count <= self._request_limit:
            window.arrivals.append(arrived_at)
            if prompt_token_count:
                window.prompt_tokens.append(prompt_token_count)
                window.answer_tokens.append(answer_token_count)

    def roll(self, now: float) -> None:
        """Ends the window whose time is over."""
        if self._began_at is None:
            self._began_at = now
        if now - self._began_at < self._window_seconds:
            return
        for tenant, window in self._windows.items():
            if window.request_count >= self._request_minimum:
                self._keep(tenant, window.vector(now - self._began_at))
        self._windows.clear()
        self._began_at = now

    def vectors(self) -> Iterator[tuple[str, list[Vector]]]:
        """Each tenant's vectors, oldest first."""
        for tenant, vectors in self._vectors.items():
            yield tenant, list(vectors)

    def _keep(self, tenant: str, vector: Vector) -> None:
        self._vectors.setdefault(tenant, deque(maxlen=self._window_limit)).append(vector)
        self._vectors.move_to_end(tenant)
        if len(self._vectors) > self._tenant_limit:
            self._vectors.popitem(last=False)


def baseline(vectors: list[Vector]) -> Baseline:
    """What is usual among the tenants, from one vector of each."""
    middles = median_vector(vectors)
    spreads = []
    for column, middle, floor in zip(zip(*vectors, strict=True), middles, SPREAD_FLOORS, strict=True):
        spreads.append(max(floor, 1.4826 * statistics.median(abs(value - middle) for value in column)))
    return Baseline(middles, tuple(spreads))


def excess(deviations: Vector) -> Vector:
    """How far a vector goes beyond what is common, in the directions that hurt: high, and regular like a clock.

    Without this the differences between ordinary tenants fill the space, and nothing stands out of it.
    """
    *high, irregularity = deviations
    return tuple(math.log1p(max(0.0, each - COMMON_DEVIATION)) for each in (*high, -irregularity))


def median_vector(vectors: list[Vector]) -> Vector:
    """What is usual for a tenant."""
    return tuple(statistics.median(column) for column in zip(*vectors, strict=True))


def _irregularity(arrivals: list[float]) -> float:
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    mean = statistics.fmean(gaps) if gaps else 0.0
    if len(gaps) < 2 or mean <= 0:
        return 1.0
    return min(LARGEST_IRREGULARITY, statistics.pstdev(gaps) / mean)
