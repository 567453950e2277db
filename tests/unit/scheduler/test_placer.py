from __future__ import annotations

import random
from collections import Counter

from tidegate.scheduler.breakers import BreakerTerms, Result
from tidegate.scheduler.placement import Policy, Weights
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.replica_table import ReplicaLoad, ReplicaTable

LOAD = ReplicaLoad(True, 0, 0, 8, 0.01, 0.1, reuses_prefixes=True)
NEW = 100.0


def make(names="abc", weights=None, **settings) -> tuple[Placer, ReplicaTable]:
    table = ReplicaTable(margin_seconds=0.25, silence_seconds=1e9, now=0.0)
    table.set_addresses(list(names))
    for replica in table:
        arrive(table, replica, 0.0)
    terms = BreakerTerms(failure_limit=1, open_seconds=5.0)
    return Placer(
        table, weights or Weights(0.6, 0.4), alternative_count=2, **{"breaker_terms": terms, **settings}
    ), table


def arrive(table, replica, now, load=LOAD, credit_count=100):
    table.connect(replica, now)
    table.hear(replica, load, now)
    replica.book.grant([f"{replica.address}{index}" for index in range(credit_count)], 1e6, now)


def fail(placer, *addresses, now=0.0):
    for address in addresses:
        placer.note(address, "x", Result.FAILED, now)


def places(placer, count, now=NEW, **request):
    return [placer.place(10, now, **request).address for _ in range(count)]


def test_a_replica_whose_breaker_is_open_gets_nothing_and_is_no_alternative():
    placer, _ = make()
    fail(placer, "b")
    placement = placer.place(10, 1.0)
    assert "b" not in (placement.address, *placement.alternatives)


def test_when_all_breakers_are_open_the_one_that_reopens_first_serves():
    placer, _ = make()
    fail(placer, "b", now=0.0)
    fail(placer, "a", "c", now=1.0)
    assert places(placer, 5, now=2.0) == ["b"] * 5


def test_a_half_open_one_gets_its_probes_only():
    placer, _ = make("ab")
    fail(placer, "a")
    assert Counter(places(placer, 20, now=5.0))["a"] == 2


def test_a_placement_that_is_put_back_frees_its_probe_and_its_credit():
    placer, table = make("a")
    fail(placer, "a")
    placement = placer.place(10, 5.0)
    placer.put_back(placement)
    assert table.get("a").book.in_flight_count == 0
    assert placer.breakers.can_send("a", 5.0)


def test_a_closed_one_without_credits_is_waited_for_rather_than_an_open_one_asked():
    placer, table = make("ab")
    table.get("a").book.revoke([f"a{index}" for index in range(100)])
    fail(placer, "b", now=NEW)
    assert placer.place(10, NEW) is None


def test_a_returned_replica_starts_slowly_beside_a_warm_one():
    placer, table = make("ab", slow_start_seconds=10.0)
    table.disconnect(table.get("b"), "gone")
    arrive(table, table.get("b"), NEW)
    assert Counter(places(placer, 8))["b"] == 1
    assert placer.slow_start_shares(NEW) == {"a": 1.0, "b": 0.1}


def test_realtime_spends_a_preempting_credit_only_where_no_plain_one_is():
    placer, table = make("ab")
    for name in "ab":
        table.get(name).book.revoke([f"{name}{index}" for index in range(100)])
    table.get("b").book.grant(["p"], 1e6, 0.0, preempting=True)
    assert placer.place(10, NEW) is None
    assert not placer.can_place(NEW)
    table.get("a").book.grant(["plain"], 1e6, 0.0)
    assert [placer.place(10, NEW, urgent=True).credit_id for _ in range(2)] == ["plain", "p"]
    assert placer.place(10, NEW, urgent=True) is None


def test_a_prompt_returns_to_where_its_beginning_is():
    placer, _ = make(weights=Weights(0.6, 0.4, 1.0), prefix_memory_blocks=100)
    (first,) = places(placer, 1, block_hashes=(1, 2, 3))
    assert set(places(placer, 5, block_hashes=(1, 2, 3))) == {first}


def test_prefixes_count_nothing_without_a_weight_or_where_they_are_not_reused():
    placer, _ = make(prefix_memory_blocks=100)
    assert len(set(places(placer, 3, block_hashes=(1, 2)))) == 3
    placer, table = make(weights=Weights(0.6, 0.4, 1.0), prefix_memory_blocks=100)
    for replica in table:
        table.hear(replica, ReplicaLoad(True, 0, 0, 8, 0.01, 0.1), NEW)
    assert len(set(places(placer, 3, block_hashes=(1, 2)))) == 3


def test_round_robin_takes_turns_whatever_is_there():
    placer, table = make(policy=Policy.ROUND_ROBIN)
    table.hear(table.get("a"), ReplicaLoad(True, 8, 9, 8, 1.0, 9.0), NEW)
    assert Counter(places(placer, 9)) == {"a": 3, "b": 3, "c": 3}


def test_least_request_evens_out_what_is_in_flight():
    placer, table = make(policy=Policy.LEAST_REQUEST)
    table.hear(table.get("a"), ReplicaLoad(True, 5, 0, 8, 0.01, 0.1), NEW)
    assert Counter(places(placer, 10)) == {"b": 5, "c": 5}


def test_of_two_that_are_drawn_the_worse_is_not_taken():
    placer, table = make("abcdef", policy=Policy.TWO_CHOICES, random_index=random.Random(1).randrange)
    table.hear(table.get("a"), ReplicaLoad(True, 8, 90, 8, 1.0, 9.0), NEW)
    counts = Counter(places(placer, 100))
    assert "a" not in counts
    assert len(counts) == 5


def test_two_choices_go_elsewhere_when_both_have_no_credit():
    placer, table = make("abcd", policy=Policy.TWO_CHOICES, random_index=lambda count: 0)
    for name in "ab":
        table.get(name).book.revoke([f"{name}{index}" for index in range(100)])
    assert places(placer, 1)[0] in "cd"
