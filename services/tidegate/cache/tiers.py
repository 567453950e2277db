"""Where answers lie: a list of tiers, the fastest first, each with its own time budget.

Invariants: a tier that fails or takes longer than its budget is a miss there and never more than that; what a lower
tier has is brought up to memory before it is promised, so that the replay finds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Final, Protocol, TypeVar

import structlog

from tidegate.cache.memory import AnswerId, Found, MemoryStore
from tidegate.cache.metrics import CacheMetrics

log = structlog.get_logger()

MEMORY: Final = "memory"

_Result = TypeVar("_Result")


class Tier(Protocol):
    """One place that keeps answers. Whatever it raises is a miss, and is counted."""

    name: str
    """As metrics and LookUpResponse.tier say it."""

    time_budget_seconds: float
    """How long one call may take; past it the call is cancelled."""

    async def get(self, answer: AnswerId, now: float) -> Found | None:
        """The value with the time it may still be kept, or None."""
        ...

    async def put(self, answer: AnswerId, value: bytes, time_to_live_seconds: float, now: float) -> bool:
        """Stores a value; False when there is no room for it."""
        ...

    async def delete(self, answer: AnswerId) -> bool:
        """Forgets one answer; says whether it was there."""
        ...

    async def clear(self, tenant: str | None) -> int:
        """Forgets a tenant's answers, or all with None; returns how many."""
        ...


class MemoryTier:
    """The first tier: it answers at once, and it can hold what was promised."""

    name = MEMORY
    time_budget_seconds = 1.0

    def __init__(self, store: MemoryStore) -> None:
        self.store = store

    async def get(self, answer: AnswerId, now: float) -> Found | None:
        return self.store.get(answer, now)

    async def put(self, answer: AnswerId, value: bytes, time_to_live_seconds: float, now: float) -> bool:
        return self.store.put(answer, value, time_to_live_seconds, now)

    async def delete(self, answer: AnswerId) -> bool:
        return self.store.delete(answer)

    async def clear(self, tenant: str | None) -> int:
        return self.store.clear(tenant)


class Tiers:
    """All tiers as one.

    Args:
        memory: the first tier.
        lower: the slower ones, fastest first.
    """

    def __init__(self, memory: MemoryTier, lower: Sequence[Tier], metrics: CacheMetrics) -> None:
        self._memory = memory
        self._tiers: tuple[Tier, ...] = (memory, *lower)
        self._metrics = metrics

    async def look_up(self, answer: AnswerId, *, hold_seconds: float, now: float) -> str | None:
        """The name of the tier that has the answer, which is held in memory for so long; None on a miss."""
        for tier in self._tiers:
            found = await self._within_budget(tier, tier.get(answer, now), None)
            if found is None:
                self._metrics.misses.labels(tier.name).inc()
                continue
            self._metrics.hits.labels(tier.name).inc()
            if tier is not self._memory:
                await self._memory.put(answer, found.value, found.remaining_seconds, now)
            # An answer for which memory has no room cannot be promised.
            return tier.name if self._memory.store.hold(answer, now + hold_seconds, now) else None
        self._metrics.show(self._memory.store)
        return None

    async def fetch(self, answer: AnswerId, now: float) -> bytes | None:
        """The answer's bytes; None on a miss. Not counted: it follows a look-up."""
        for tier in self._tiers:
            found = await self._within_budget(tier, tier.get(answer, now), None)
            if found is not None:
                return found.value
        return None

    async def put(self, answer: AnswerId, value: bytes, time_to_live_seconds: float, now: float) -> bool:
        """Stores an answer in every tier; says whether any has kept it."""
        kept = [
            await self._within_budget(tier, tier.put(answer, value, time_to_live_seconds, now), False)
            for tier in self._tiers
        ]
        self._metrics.show(self._memory.store)
        return any(kept)

    async def clear(self, tenant: str | None) -> int:
        """Forgets a tenant's answers, or all with None, in every tier; the most that any had."""
        counts = [await self._within_budget(tier, tier.clear(tenant), 0) for tier in self._tiers]
        self._metrics.show(self._memory.store)
        return max(counts)

    async def _within_budget(self, tier: Tier, call: Awaitable[_Result], otherwise: _Result) -> _Result:
        if tier is self._memory:
            return await call
        try:
            async with asyncio.timeout(tier.time_budget_seconds):
                return await call
        except TimeoutError:
            cause = "timeout"
        except Exception as error:
            cause = "error"
            log.warning("tier_failed", tier=tier.name, error=repr(error))
        self._metrics.failures.labels(tier.name, cause).inc()
        return otherwise
