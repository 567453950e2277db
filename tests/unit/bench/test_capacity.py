"""The search for C: it finds the edge, below what a closed loop completes, in a bounded number of runs."""

from __future__ import annotations

import random

import pytest

from tidegate.bench.capacity import PRECISION, RUN_LIMIT, CapacitySearch


def found(search: CapacitySearch, share_at) -> float:
    while not search.is_done:
        search.observe(search.next_rate, share_at(search.next_rate))
    return search.capacity


@pytest.mark.parametrize("edge", [0.35, 3.0, 41.0, 46.0])
def test_it_finds_the_edge_from_below(edge):
    search = CapacitySearch(ceiling=46.0)
    capacity = found(search, lambda rate: 1.0 if rate <= edge else 0.5)
    assert edge / (1 + PRECISION) ** 1.01 <= capacity <= edge
    assert search.run_count < RUN_LIMIT


def test_what_a_short_run_hides_in_a_queue_does_not_lift_it_above_the_closed_loop():
    assert found(CapacitySearch(ceiling=30), lambda rate: 1.0) <= 30 * (1 + PRECISION)


def test_a_server_that_is_never_in_time_has_no_capacity():
    search = CapacitySearch(ceiling=30)
    assert found(search, lambda rate: 0.2) == 0
    assert search.run_count == RUN_LIMIT


def test_runs_that_contradict_each_other_do_not_keep_it_from_ending():
    chance = random.Random(3)
    for _ in range(200):
        search = CapacitySearch(ceiling=50)
        assert found(search, lambda rate: 1.0 if chance.random() < 0.5 else 0.9) <= 50 * (1 + PRECISION)
        assert search.run_count <= RUN_LIMIT
