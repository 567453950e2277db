from __future__ import annotations

import dataclasses

import pytest

from tidegate.scheduler.credits import CreditBook
from tidegate.scheduler.placement import Weights, choose, order, scores
from tidegate.scheduler.replica_table import Replica, ReplicaLoad

WEIGHTS = Weights(latency=0.6, queue=0.4)


def replica(name, *, ttft=0.1, tpot=0.01, running=0, waiting=0, slots=8, credit_count=1, number=0):
    book = CreditBook(0.25)
    book.grant([f"{name}-{index}" for index in range(credit_count)], 60, 0)
    load = ReplicaLoad(
        is_ready=True,
        running_request_count=running,
        waiting_request_count=waiting,
        slot_count=slots,
        seconds_per_output_token=tpot,
        time_to_first_token_seconds=ttft,
    )
    return Replica(name, book, is_connected=True, load=load, dispatch_number=number)


def names(replicas):
    return [each.address for each in replicas]


def test_the_score_is_the_weighted_sum_of_both_parts_from_best_to_worst():
    quick, slow = replica("quick", ttft=1, tpot=0, running=8), replica("slow", ttft=3, tpot=0, running=0)
    assert scores([quick, slow], WEIGHTS, 10) == pytest.approx([0.4, 0.6])


def test_a_middle_replica_stands_in_proportion():
    replicas = [replica("a", ttft=1, tpot=0), replica("b", ttft=2, tpot=0), replica("c", ttft=3, tpot=0)]
    assert scores(replicas, WEIGHTS, 10) == pytest.approx([0.0, 0.3, 0.6])


def test_the_latency_of_a_long_answer_is_its_tokens():
    quick_start, quick_tokens = replica("start", ttft=0.1, tpot=0.1), replica("tokens", ttft=1.0, tpot=0.01)
    assert names(order([quick_start, quick_tokens], WEIGHTS, 1)) == ["start", "tokens"]
    assert names(order([quick_start, quick_tokens], WEIGHTS, 100)) == ["tokens", "start"]


def test_noise_in_the_latency_does_not_outweigh_the_queue():
    busy, idle = replica("busy", ttft=1.00, tpot=0, running=8), replica("idle", ttft=1.01, tpot=0, running=0)
    assert names(order([busy, idle], WEIGHTS, 1)) == ["idle", "busy"]


def test_queues_are_compared_in_shares_of_the_slots():
    large, small = replica("large", running=8, slots=64), replica("small", running=4, slots=8)
    assert names(order([large, small], WEIGHTS, 1)) == ["large", "small"]


def test_what_was_just_sent_counts_before_the_replica_says_so():
    first, second = replica("first", credit_count=4), replica("second")
    first.book.spend(0)
    assert names(order([first, second], WEIGHTS, 1)) == ["second", "first"]


def test_equal_replicas_take_turns():
    first, second = replica("first", number=2), replica("second", number=1)
    assert names(order([first, second], WEIGHTS, 1)) == ["second", "first"]


def test_all_weight_on_the_queue_ignores_latency():
    quick, idle = replica("quick", ttft=0.1, running=4), replica("idle", ttft=9, running=0)
    assert names(order([quick, idle], Weights(latency=0, queue=1), 100)) == ["idle", "quick"]


def test_the_best_with_a_credit_is_chosen():
    best, next_best = replica("best", credit_count=0), replica("next")
    assert choose([best, next_best], 0) is next_best
    assert choose([best], 0) is None


def test_scores_of_no_and_of_one_replica():
    assert scores([], WEIGHTS, 1) == []
    assert scores([replica("only", ttft=5, running=3)], WEIGHTS, 1) == [0.0]


def test_a_known_prompt_outweighs_quicker_tokens_and_one_request_that_has_perhaps_ended():
    knowing, quick = replica("knowing", ttft=1, running=1, slots=32), replica("quick", ttft=0.1, slots=32)
    for each in (knowing, quick):
        each.load = dataclasses.replace(each.load, reuses_prefixes=True)
    weights = dataclasses.replace(WEIGHTS, prefix=1.0)
    assert names(order([quick, knowing], weights, 10, prefix_shares=[0.0, 0.75])) == ["knowing", "quick"]
    assert names(order([quick, knowing], weights, 10, prefix_shares=[0.0, 0.5])) == ["quick", "knowing"]
