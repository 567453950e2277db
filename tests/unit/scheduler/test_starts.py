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


def say(table, *, starting, running=0, arrived=(), now=0.0):
    load = ReplicaLoad(
        True, running, 0, 64, 0.01, 0.1, starting_request_count=starting, arrived_credit_ids=tuple(arrived)
    )
    table.hear(table.get("a:1"), load, now)


def credits_placed(placer, now, **fields):
    """The credits of as many requests as can be placed one after the other."""
    return [one.credit_id for one in iter(lambda: placer.place(10, now, **fields), None)]


def placed(placer, now, **fields):
    return len(credits_placed(placer, now, **fields))


def placer_of(table, **fields):
    return Placer(table, Weights(0.6, 0.4), alternative_count=0, **fields)


def test_a_replica_that_fills_up_gets_a_share_of_its_slots_at_once(table):
    assert placed(placer_of(table, start_share=0.25), 0.0) == 16


def test_more_go_there_when_it_says_that_prompts_are_computed(table):
    placer = placer_of(table, start_share=0.25)
    sent = credits_placed(placer, 0.0)
    say(table, starting=10, running=14, arrived=sent[:14], now=0.1)
    assert placed(placer, 0.1) == 4
    say(table, starting=0, running=16, arrived=sent[14:], now=0.2)
    assert placed(placer, 0.2) == 12


def test_an_outcome_that_comes_late_makes_no_request_look_as_if_it_were_on_its_way(table):
    placer = placer_of(table, start_share=0.25)
    sent = credits_placed(placer, 0.0)
    say(table, starting=0, running=0, arrived=sent, now=0.1)
    assert placed(placer, 0.1) == 16


def test_where_answers_are_short_as_many_begin_as_it_takes(table):
    placer = placer_of(table, start_share=0.0625)
    replica = table.get("a:1")
    for number in range(60):
        replica.note_end(f"ended-{number}", 0.1 + number / 100)
    # Sixty a second, of which each has no token for 0.1 s: six at once, and twice as many are let begin.
    assert placed(placer, 0.7) == 12
    assert placed(placer, 3.0) == 4


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


def test_a_small_replica_computes_four_prompts_at_once_all_the_same(table):
    load = ReplicaLoad(True, 0, 0, 8, 0.01, 0.1)
    table.hear(table.get("a:1"), load, 0)
    assert placed(placer_of(table, start_share=0.25), 0.0) == 4
