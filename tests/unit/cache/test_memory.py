"""What stays in memory: bounded in bytes, oldest first, never another tenant's, and held while it is promised."""

from __future__ import annotations

import random

import pytest

from tidegate.cache.memory import ENTRY_OVERHEAD_BYTES, AnswerId, MemoryStore

NOW = 100.0
ENTRY_BYTES = ENTRY_OVERHEAD_BYTES + 32 + 1 + 1000
"""One of `value`'s entries with a tenant of one letter."""


def answer(number: int, tenant: str = "a") -> AnswerId:
    return AnswerId(tenant, number.to_bytes(32, "big"))


def value(number: int) -> bytes:
    return number.to_bytes(4, "big") * 250


def put(store: MemoryStore, number: int, *, now: float = NOW, seconds: float = 60.0) -> bool:
    return store.put(answer(number), value(number), seconds, now)


def held(store: MemoryStore, numbers: range, now: float = NOW) -> list[int]:
    """Which of these are there; asked without using them."""
    return [number for number in numbers if answer(number) in store._entries]


def test_a_value_comes_back_with_the_time_it_has_left() -> None:
    store = MemoryStore(10_000)
    assert put(store, 1, seconds=60)
    found = store.get(answer(1), NOW + 20)
    assert found == (value(1), 40.0)


def test_a_tenant_never_finds_anothers() -> None:
    store = MemoryStore(10_000)
    put(store, 1)
    assert store.get(answer(1, "b"), NOW) is None
    assert not store.hold(answer(1, "b"), NOW + 1, NOW)


def test_the_entrys_own_tenant_is_asked_again() -> None:
    store = MemoryStore(10_000)
    put(store, 1)
    store._entries[answer(1)].tenant = "b"
    assert store.get(answer(1), NOW) is None


def test_an_entry_expires() -> None:
    store = MemoryStore(10_000)
    put(store, 1, seconds=60)
    assert store.get(answer(1), NOW + 59.9) is not None
    assert store.get(answer(1), NOW + 60) is None
    assert (store.byte_count, store.expired_count, store.evicted_count) == (0, 1, 0)


def test_the_least_recently_used_leaves_first() -> None:
    store = MemoryStore(3 * ENTRY_BYTES)
    for number in range(3):
        put(store, number)
    store.get(answer(0), NOW)
    put(store, 3)
    assert held(store, range(4)) == [0, 2, 3]
    assert (store.evicted_count, store.byte_count) == (1, 3 * ENTRY_BYTES)


def test_a_large_entry_pushes_out_as_many_as_it_needs() -> None:
    store = MemoryStore(3 * ENTRY_BYTES)
    for number in range(3):
        put(store, number)
    assert store.put(answer(9), bytes(1001), 60, NOW)
    assert held(store, range(10)) == [2, 9]


def test_an_entry_larger_than_the_store_is_not_kept_and_pushes_nothing_out() -> None:
    store = MemoryStore(2 * ENTRY_BYTES)
    put(store, 1)
    assert not store.put(answer(2), bytes(2 * ENTRY_BYTES), 60, NOW)
    assert held(store, range(3)) == [1]


def test_a_store_without_bytes_keeps_nothing() -> None:
    assert not put(MemoryStore(0), 1)


def test_what_is_held_is_neither_evicted_nor_expired() -> None:
    store = MemoryStore(2 * ENTRY_BYTES)
    put(store, 0, seconds=1)
    assert store.hold(answer(0), NOW + 5, NOW)
    for number in range(1, 5):
        put(store, number)
    assert store.get(answer(0), NOW + 4.9) == (value(0), 0.0)
    assert store.get(answer(0), NOW + 5) is None


def test_when_everything_is_held_nothing_is_put() -> None:
    store = MemoryStore(2 * ENTRY_BYTES)
    for number in range(2):
        put(store, number)
        store.hold(answer(number), NOW + 5, NOW)
    assert not put(store, 2)
    assert put(store, 2, now=NOW + 5)


def test_a_hold_is_not_shortened_by_another_look_up() -> None:
    store = MemoryStore(ENTRY_BYTES)
    put(store, 0)
    store.hold(answer(0), NOW + 5, NOW)
    store.hold(answer(0), NOW + 1, NOW)
    assert not put(store, 1, now=NOW + 2)


def test_putting_again_replaces_and_counts_once() -> None:
    store = MemoryStore(ENTRY_BYTES)
    put(store, 1, seconds=1)
    assert store.put(answer(1), value(7), 60, NOW)
    assert store.get(answer(1), NOW + 2) == (value(7), 58.0)
    assert (store.byte_count, len(store), store.evicted_count) == (ENTRY_BYTES, 1, 0)


def test_replacing_a_held_entry_keeps_it_held() -> None:
    store = MemoryStore(ENTRY_BYTES)
    put(store, 1)
    store.hold(answer(1), NOW + 5, NOW)
    assert put(store, 1)
    assert not put(store, 2, now=NOW + 4)


def test_clear_forgets_one_tenants_or_all() -> None:
    store = MemoryStore(100_000)
    for number in range(3):
        store.put(answer(number, "a"), b"x", 60, NOW)
        store.put(answer(number, "b"), b"x", 60, NOW)
    assert store.clear("a") == 3
    assert store.clear("a") == 0
    assert len(store) == 3
    assert store.clear(None) == 3
    assert store.byte_count == 0


def test_delete_says_whether_it_was_there() -> None:
    store = MemoryStore(10_000)
    put(store, 1)
    assert store.delete(answer(1))
    assert not store.delete(answer(1))


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    limit = 20_000
    store = MemoryStore(limit)
    now = NOW
    latest: dict[AnswerId, tuple[bytes, float]] = {}
    holds: dict[AnswerId, float] = {}
    for _ in range(1500):
        now += rng.choice([0.0, 0.125, 1.0])
        key = answer(rng.randrange(30), rng.choice("ab"))
        act = rng.random()
        if act < 0.5:
            data = rng.randbytes(rng.randrange(4000))
            if store.put(key, data, 10, now):
                latest[key] = (data, now + 10)
        elif act < 0.7:
            if store.hold(key, now + 2, now):
                holds[key] = max(holds.get(key, 0), now + 2)
        elif act < 0.72:
            store.clear(key.tenant)
            holds = {one: until for one, until in holds.items() if one.tenant != key.tenant}
        else:
            found = store.get(key, now)
            if found is not None:
                assert found.value == latest[key][0]
                assert now < latest[key][1] or now < holds.get(key, 0)
        assert 0 <= store.byte_count <= limit
        assert store.byte_count == sum(entry.byte_count for entry in store._entries.values())
        assert all(key in store._entries for key, until in holds.items() if until > now)
