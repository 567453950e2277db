"""Tiers: the first that has it answers, what is found below comes up, and a bad tier is only ever a miss."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from tidegate.cache.memory import AnswerId, Found, MemoryStore
from tidegate.cache.metrics import CacheMetrics
from tidegate.cache.tiers import MemoryTier, Tiers

NOW = 100.0
ANSWER = AnswerId("a", bytes(32))


class FakeTier:
    """A lower tier that can be made slow or broken."""

    def __init__(self, name: str = "disk", *, delay_seconds: float = 0.0, error: Exception | None = None) -> None:
        self.name = name
        self.time_budget_seconds = 0.05
        self.values: dict[AnswerId, bytes] = {}
        self.cancelled = 0
        self._delay_seconds = delay_seconds
        self._error = error

    async def get(self, answer: AnswerId, now: float) -> Found | None:
        await self._behave()
        value = self.values.get(answer)
        return None if value is None else Found(value, 30.0)

    async def put(self, answer: AnswerId, value: bytes, time_to_live_seconds: float, now: float) -> bool:
        await self._behave()
        self.values[answer] = value
        return True

    async def delete(self, answer: AnswerId) -> bool:
        await self._behave()
        return self.values.pop(answer, None) is not None

    async def clear(self, tenant: str | None) -> int:
        await self._behave()
        count = len(self.values)
        self.values.clear()
        return count

    async def _behave(self) -> None:
        try:
            await asyncio.sleep(self._delay_seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error is not None:
            raise self._error


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def tiers_over(registry: CollectorRegistry, *lower: FakeTier, byte_limit: int = 100_000) -> Tiers:
    return Tiers(MemoryTier(MemoryStore(byte_limit)), lower, CacheMetrics(registry))


async def test_what_was_put_is_found_in_memory(registry: CollectorRegistry) -> None:
    tiers = tiers_over(registry)
    assert await tiers.look_up(ANSWER, hold_seconds=2, now=NOW) is None
    assert await tiers.put(ANSWER, b"x", 60, NOW)
    assert await tiers.look_up(ANSWER, hold_seconds=2, now=NOW) == "memory"
    assert await tiers.fetch(ANSWER, NOW) == b"x"
    assert registry.get_sample_value("tidegate_cache_hits_total", {"tier": "memory"}) == 1
    assert registry.get_sample_value("tidegate_cache_misses_total", {"tier": "memory"}) == 1


async def test_what_a_lower_tier_has_comes_up_to_memory_with_its_remaining_time(registry: CollectorRegistry) -> None:
    disk = FakeTier()
    disk.values[ANSWER] = b"x"
    tiers = tiers_over(registry, disk)
    assert await tiers.look_up(ANSWER, hold_seconds=2, now=NOW) == "disk"
    disk.values.clear()
    assert await tiers.look_up(ANSWER, hold_seconds=2, now=NOW + 27) == "memory"
    assert await tiers.look_up(ANSWER, hold_seconds=2, now=NOW + 31) is None


async def test_the_first_tier_that_has_it_answers(registry: CollectorRegistry) -> None:
    disk, objects = FakeTier("disk"), FakeTier("objects")
    disk.values[ANSWER] = objects.values[ANSWER] = b"x"
    assert await tiers_over(registry, disk, objects).look_up(ANSWER, hold_seconds=2, now=NOW) == "disk"


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (FakeTier("bad", delay_seconds=5), "timeout"),
        (FakeTier("bad", error=RuntimeError("broken")), "error"),
        (FakeTier("bad", error=OSError("gone")), "error"),
    ],
)
async def test_a_slow_or_failing_tier_is_a_miss_and_the_next_is_asked(
    registry: CollectorRegistry, bad: FakeTier, cause: str
) -> None:
    objects = FakeTier("objects")
    objects.values[ANSWER] = b"x"
    tiers = tiers_over(registry, bad, objects)
    async with asyncio.timeout(1):
        assert await tiers.look_up(ANSWER, hold_seconds=2, now=NOW) == "objects"
        assert await tiers.put(ANSWER, b"y", 60, NOW)
        assert await tiers.clear(None) == 1
    assert registry.get_sample_value("tidegate_cache_failures_total", {"tier": "bad", "cause": cause}) == 3
    assert bad.cancelled == (3 if cause == "timeout" else 0)


async def test_what_memory_has_no_room_for_is_not_promised(registry: CollectorRegistry) -> None:
    disk = FakeTier()
    disk.values[ANSWER] = b"x"
    assert await tiers_over(registry, disk, byte_limit=0).look_up(ANSWER, hold_seconds=2, now=NOW) is None


async def test_the_state_of_memory_is_shown(registry: CollectorRegistry) -> None:
    tiers = tiers_over(registry, byte_limit=1000)
    await tiers.put(ANSWER, bytes(100), 60, NOW)
    await tiers.put(AnswerId("b", bytes(32)), bytes(500), 60, NOW)
    assert registry.get_sample_value("tidegate_cache_answers", {"tier": "memory"}) == 1
    assert registry.get_sample_value("tidegate_cache_bytes", {"tier": "memory"}) == 933
    evictions = {"tier": "memory", "cause": "evicted"}
    assert registry.get_sample_value("tidegate_cache_evictions_total", evictions) == 1
