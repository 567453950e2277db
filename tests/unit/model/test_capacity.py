from __future__ import annotations

import math
import random

import pytest

from tidegate.model.capacity import Bounds, Capacity, KvBound, TpotBound
from tidegate.model.look_ahead import LookAhead


def bounds(free: int = 100, total: int = 100, slots: int = 32) -> Bounds:
    return Bounds(max_sequences=slots, free_blocks=free, total_blocks=total, block_token_count=16)


def slots_of(kv: KvBound, engine_count: int, free: int, total: int = 100) -> int | None:
    return kv.slots(engine_count=engine_count, free_blocks=free, total_blocks=total, block_token_count=16)


def test_before_anything_is_known_the_engines_own_bound_holds():
    assert Capacity().slots(bounds(), engine_count=0, tpot_seconds=None, now=0.0) == 32


def test_an_engine_that_is_away_has_no_slots():
    assert Capacity().slots(bounds(slots=0), engine_count=0, tpot_seconds=None, now=0.0) == 0


def test_the_blocks_bound_the_slots_and_one_requests_need_stays_free():
    capacity = Capacity()
    capacity.kv.add_request(160, 0.0)
    assert capacity.slots(bounds(), engine_count=0, tpot_seconds=None, now=0.0) == 9


def test_those_that_run_are_counted_with_what_they_will_need_or_hold_already():
    kv = KvBound()
    kv.add_request(160, 0.0)
    assert slots_of(kv, engine_count=4, free=96) == 9
    assert slots_of(kv, engine_count=4, free=20) == 5


def test_a_request_larger_than_all_blocks_still_leaves_one_slot():
    kv = KvBound()
    kv.add_request(100_000, 0.0)
    assert slots_of(kv, engine_count=0, free=100) == 1


def test_the_need_of_a_request_does_not_shrink_while_none_ends():
    kv = KvBound()
    kv.add_request(160, 0.0)
    kv.add_request(320, 3_600.0)
    assert kv.block_count(16) == pytest.approx(20, abs=1)


def test_without_a_target_the_time_of_a_token_bounds_nothing():
    bound = TpotBound(0.0)
    bound.update(9.0, 8, 8, now=0.0)
    assert bound.slots == math.inf


def test_a_broken_target_cuts_what_ran_once_until_it_shows():
    bound = TpotBound(0.1)
    for now in (0.0, 1.0, 4.9):
        bound.update(0.2, 20, 32, now)
    assert bound.slots == 18
    bound.update(0.2, 18, 32, now=5.0)
    assert bound.slots == 16


def test_near_its_target_the_bound_stays():
    bound = TpotBound(0.1)
    bound.update(0.2, 20, 32, now=0.0)
    bound.update(0.095, 18, 32, now=10.0)
    assert bound.slots == 18


def test_below_its_target_the_bound_rises_only_where_it_is_used_and_ends_at_the_engines():
    bound = TpotBound(0.1)
    bound.update(0.2, 10, 11, now=0.0)
    bound.update(0.05, 3, 11, now=10.0)
    assert bound.slots == 9
    bound.update(0.05, 9, 11, now=11.0)
    assert bound.slots == 10
    bound.update(0.05, 10, 11, now=12.0)
    assert bound.slots == math.inf


def test_the_bound_never_falls_below_one():
    bound = TpotBound(0.001)
    for turn in range(100):
        bound.update(5.0, 1, 32, now=turn * 10.0)
    assert bound.slots == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_target_settles_near_the_most_that_keeps_it(seed):
    """The token's time grows by 5 ms a sequence, with noise, and is seen through an average of 2 s."""
    dice, bound, seen, held = random.Random(seed), TpotBound(0.1), 0.0, []
    for turn in range(4_000):
        running = int(min(64, bound.slots))
        seen += ((0.005 * running) * dice.uniform(0.9, 1.1) - seen) * 0.035
        bound.update(seen, running, 64, now=turn * 0.1)
        if turn > 2_000:
            held.append(running)
    # 20 sequences meet the target exactly.
    assert sum(held) / len(held) >= 16
    assert max(held) <= 22
    assert min(held) >= 14


def test_nothing_is_promised_ahead_before_a_gap_was_measured_or_where_it_is_off():
    look = LookAhead(4, 0.0)
    look.add_turnover(0.0)
    assert look.ahead(8, 0.1, 0.0) == 0
    off = LookAhead(0, 0.0)
    off.add_gap(0.1, 0.0)
    off.add_turnover(0.0)
    assert off.ahead(8, 0.1, 0.0) == 0


def steady(rate: int, gap: float) -> LookAhead:
    look = LookAhead(16, 0.0)
    for turn in range(30 * rate):
        look.add_turnover(turn / rate)
        look.add_gap(gap, turn / rate)
    return look


def test_as_many_credits_stand_ahead_as_slots_are_empty_on_average():
    assert steady(rate=100, gap=0.025).ahead(32, None, 30.0) == 3


def test_a_gap_within_a_step_costs_the_whole_step():
    assert steady(rate=10, gap=0.02).ahead(32, 0.25, 30.0) == 3


def test_what_is_hardly_empty_needs_nothing_ahead():
    assert steady(rate=1, gap=0.01).ahead(64, 0.01, 30.0) == 0


def test_the_look_ahead_is_at_most_a_quarter_of_the_slots_but_one():
    assert steady(rate=100, gap=1.0).ahead(16, None, 30.0) == 4
    assert steady(rate=100, gap=1.0).ahead(1, None, 30.0) == 1
