from __future__ import annotations

import dataclasses
import random

import pytest

from tidegate.scheduler import slow_start
from tidegate.scheduler.breakers import Breakers, BreakerTerms, Result, State
from tidegate.scheduler.prefixes import PrefixMemory

TERMS = BreakerTerms(failure_limit=3, slow_limit=4, slow_factor=1.2, open_seconds=5.0, probe_limit=2)
FAILED, GOOD, NOTHING = Result.FAILED, Result.GOOD, Result.NOTHING


def note(breakers: Breakers, address: str, result: Result, count: int = 1, now: float = 0.0, **fields) -> None:
    for _ in range(count):
        breakers.note(address, "c", result, now, **fields)


def opened() -> Breakers:
    breakers = Breakers(TERMS)
    note(breakers, "a", FAILED, 3)
    return breakers


def test_failures_in_a_row_open_it_and_a_good_answer_between_does_not():
    breakers = Breakers(TERMS)
    note(breakers, "a", FAILED, 2)
    note(breakers, "a", GOOD)
    note(breakers, "a", FAILED, 2)
    assert breakers.can_send("a", 0.0)
    note(breakers, "a", FAILED)
    assert not breakers.can_send("a", 0.0)
    assert breakers.reason("a") == "3 failures in a row"


def test_what_says_nothing_opens_nothing_and_excuses_nothing():
    breakers = Breakers(TERMS)
    note(breakers, "a", NOTHING, 100)
    note(breakers, "a", FAILED, 2)
    note(breakers, "a", NOTHING)
    note(breakers, "a", FAILED)
    assert breakers.state("a", 0.0) is State.OPEN


def test_a_replica_ten_times_slower_than_the_others_opens():
    breakers = Breakers(TERMS)
    for _ in range(10):
        note(breakers, "a", GOOD, seconds=1.0, size=10)
        note(breakers, "b", GOOD, seconds=1.1, size=10)
    note(breakers, "c", GOOD, 3, seconds=10.0, size=10)
    assert breakers.state("c", 0.0) is State.CLOSED
    note(breakers, "c", GOOD, seconds=10.0, size=10)
    assert breakers.state("c", 0.0) is State.OPEN
    assert "slower" in breakers.reason("c")


def test_long_answers_are_not_slow_ones():
    breakers = Breakers(TERMS)
    note(breakers, "a", GOOD, 20, seconds=1.0, size=10)
    note(breakers, "b", GOOD, 20, seconds=100.0, size=1000)
    assert breakers.state("b", 0.0) is State.CLOSED


def test_one_replica_alone_is_never_slow():
    breakers = Breakers(TERMS)
    note(breakers, "a", GOOD, 50, seconds=1.0, size=10)
    note(breakers, "a", GOOD, 50, seconds=100.0, size=10)
    assert breakers.state("a", 0.0) is State.CLOSED


@pytest.mark.parametrize(("quantile", "state"), [(0.9, State.CLOSED), (0.5, State.OPEN)])
def test_slow_is_told_by_the_quantile_that_is_set(quantile, state):
    breakers = Breakers(dataclasses.replace(TERMS, slow_quantile=quantile))
    for number in range(20):
        note(breakers, "a", GOOD, seconds=10.0 if number % 5 == 0 else 1.0, size=10)
    note(breakers, "b", GOOD, TERMS.slow_limit, seconds=2.0, size=10)
    assert breakers.state("b", 0.0) is state


def test_without_a_factor_only_failures_count():
    breakers = Breakers(BreakerTerms(slow_factor=0.0))
    note(breakers, "a", GOOD, 50, seconds=1.0, size=10)
    note(breakers, "b", GOOD, 50, seconds=100.0, size=10)
    assert breakers.state("b", 0.0) is State.CLOSED


@pytest.mark.parametrize("seed", range(10))
def test_ordinary_noise_opens_nothing(seed):
    dice, breakers = random.Random(seed), Breakers(BreakerTerms())
    for _ in range(2_000):
        note(breakers, dice.choice("ab"), GOOD, seconds=dice.lognormvariate(0, 0.5), size=1.0)
    assert {breakers.state(address, 0.0) for address in "ab"} == {State.CLOSED}


def test_an_open_one_takes_a_bounded_number_of_probes_and_good_ones_close_it():
    breakers = opened()
    assert not breakers.can_send("a", 4.9)
    for credit_id in ("1", "2"):
        assert breakers.can_send("a", 5.0)
        breakers.send("a", credit_id, 5.0)
    assert not breakers.can_send("a", 5.0)
    breakers.note("a", "1", GOOD, 6.0)
    assert breakers.state("a", 6.0) is State.HALF_OPEN
    breakers.note("a", "2", GOOD, 7.0)
    assert breakers.state("a", 7.0) is State.CLOSED
    assert breakers.closed_at("a") == 7.0


def test_a_failed_probe_opens_it_for_twice_as_long():
    breakers = opened()
    breakers.send("a", "1", 5.0)
    breakers.note("a", "1", FAILED, 6.0)
    assert breakers.reopens_at("a") == 6.0 + 10.0


def test_a_probe_that_was_not_sent_or_never_ends_makes_room_for_another():
    breakers = opened()
    breakers.send("a", "1", 5.0)
    breakers.send("a", "2", 5.0)
    breakers.unsend("a", "1")
    assert breakers.can_send("a", 5.0)
    breakers.send("a", "3", 5.0)
    assert not breakers.can_send("a", 64.9)
    assert breakers.can_send("a", 65.0)


def test_an_answer_from_before_it_opened_does_not_judge_it():
    breakers = opened()
    breakers.send("a", "probe", 5.0)
    breakers.note("a", "old", FAILED, 5.1)
    assert breakers.state("a", 5.1) is State.HALF_OPEN


def test_a_replica_that_is_gone_is_forgotten():
    breakers = opened()
    breakers.keep({"b"})
    assert breakers.can_send("a", 0.0)


def test_a_new_replicas_share_grows_beside_a_warm_one():
    assert slow_start.shares([0.0, 100.0], 10.0, 100.0) == [1.0, slow_start.FIRST_SHARE]
    assert slow_start.shares([0.0, 100.0], 10.0, 105.0)[1] == pytest.approx(0.55)
    assert slow_start.shares([0.0, 100.0], 10.0, 110.0) == [1.0, 1.0]


def test_where_all_are_new_none_is_held_back():
    assert slow_start.shares([100.0, 100.0], 10.0, 101.0) == [1.0, 1.0]


def test_one_request_at_a_time_is_always_within_the_share():
    assert slow_start.has_room(0, 4, 0.1)
    assert not slow_start.has_room(1, 4, 0.1)
    assert slow_start.has_room(1, 4, 0.5)
    assert slow_start.has_room(99, 4, 1.0)


def test_a_prompts_beginning_is_remembered_where_it_was_sent():
    memory = PrefixMemory(10)
    memory.remember("a", [1, 2, 3])
    assert memory.share("a", [1, 2, 3, 4]) == 0.75
    assert memory.share("a", [9, 2, 3]) == 0.0
    assert memory.share("b", [1]) == 0.0
    assert memory.share("a", []) == 0.0


def test_the_memory_is_bounded_and_a_prompts_end_is_forgotten_first():
    memory = PrefixMemory(4)
    memory.remember("a", [1, 2, 3])
    memory.remember("a", [7, 8])
    assert memory.share("a", [1, 2, 3]) == pytest.approx(2 / 3)
    assert memory.share("a", [7, 8]) == 1.0


def test_no_memory_without_a_limit_and_none_of_replicas_that_are_gone():
    nothing, memory = PrefixMemory(0), PrefixMemory(4)
    nothing.remember("a", [1])
    memory.remember("a", [1])
    memory.keep({"b"})
    assert (nothing.share("a", [1]), memory.share("a", [1])) == (0.0, 0.0)
