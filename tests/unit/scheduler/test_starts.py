"""How many prompts a replica is given to compute at once."""

from __future__ import annotations

import pytest

from tidegate.scheduler.placement import Weights
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.replica_table import ReplicaLoad, ReplicaTable


@pytest.fixture
def table():
    table = ReplicaTable(margin_seconds=0.1, silence_seconds=60, now=0)
    table.set_addresses(["a:1"])
    replica = table.get("a:1")
    table.connect(replica, 0)
    say(table, starting=0)
    replica.book.grant([str(number) for number in range(100)], 60, 0)
    return table


def say(table, *, starting, running=0, now=0.0):
    load = ReplicaLoad(True, running, 0, 64, 0.01, 0.1, starting_request_count=starting)
    table.hear(table.get("a:1"), load, now)


def placed(placer, now, **fields):
    """How many can be placed one after the other."""
    count = 0
    while placer.place(10, now, **fields) is not None:
        count += 1
    return count


def placer_of(table, **fields):
    return Placer(table, Weights(0.6, 0.4), alternative_count=0, **fields)


def test_a_replica_that_fills_up_gets_a_share_of_its_slots_at_once(table):
    assert placed(placer_of(table, start_share=0.25), 0.0) == 16


def test_more_go_there_when_it_says_that_prompts_are_computed(table):
    placer = placer_of(table, start_share=0.25)
    placed(placer, 0.0)
    say(table, starting=10, running=16, now=0.1)
    assert placed(placer, 0.1) == 6


def test_a_request_that_never_arrives_does_not_count_for_long(table):
    placer = placer_of(table, start_share=0.25)
    placed(placer, 0.0)
    assert placed(placer, 0.1) == 0
    assert placed(placer, 1.0) == 16


def test_a_batch_request_waits_until_few_prompts_are_computed(table):
    placer = placer_of(table, start_share=0.25, batch_start_share=0.0625)
    assert placed(placer, 0.0, is_batch=True) == 4
    assert placed(placer, 0.0) == 12


def test_a_realtime_request_never_waits_for_others_prompts(table):
    placer = placer_of(table, start_share=0.25)
    placed(placer, 0.0)
    assert placer.place(10, 0.0, urgent=True) is not None


def test_a_small_replica_is_given_all_that_it_has_slots_for(table):
    load = ReplicaLoad(True, 0, 0, 8, 0.01, 0.1)
    table.hear(table.get("a:1"), load, 0)
    assert placed(placer_of(table, start_share=0.25), 0.0) == 8
