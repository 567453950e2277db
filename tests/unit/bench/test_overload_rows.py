"""What the overload benchmark reads from columns and metrics, and how it compares."""

from __future__ import annotations

import math
import sys

import pytest
from bench_modules import module
from prometheus_client.parser import text_string_to_metric_families

from tidegate.bench.columns import columns_of
from tidegate.bench.ledger import Attempt, Ending, Outcome, Record, judge
from tidegate.bench.lengths import ConstantLength
from tidegate.bench.scenarios import Shape


@pytest.fixture(scope="module")
def rows():
    return module("overload_rows.py")


@pytest.fixture(scope="module")
def peers():
    return module("overload_peers.py")


def test_attempts_at_an_engine_are_all_it_began_and_all_that_went_on():
    metrics = module("replica_metrics.py")
    page = (
        "# HELP tidegate_requests_total Requests that ended, by outcome and reason.\n"
        "# TYPE tidegate_requests_total counter\n"
        'tidegate_requests_total{outcome="completed",reason=""} 41.0\n'
        'tidegate_requests_total{outcome="cancelled",reason="CANCELLED"} 5.0\n'
        'tidegate_requests_total{outcome="refused",reason="SERVER_IS_OVERLOADED"} 7.0\n'
        "# HELP tidegate_resumes_total Streams that went on after their engine broke.\n"
        "# TYPE tidegate_resumes_total counter\n"
        "tidegate_resumes_total 2.0\n"
    )
    found = list(text_string_to_metric_families(page))
    assert metrics.engine_attempts(found) == 48
    assert metrics.total(found + found, "tidegate_requests_total") == 2 * 53


def record(
    number: int, ending: Ending, *, first_token: float | None = None, ended: float = 1.0, planned: float = 0.0
) -> Record:
    """One request, to be answered within 2 s; times count from when it is planned."""
    attempt = Attempt(
        due=planned,
        sent=planned,
        ended=planned + ended,
        ending=ending,
        first_token=first_token and planned + first_token,
        last_token=first_token and planned + ended,
    )
    found = Record(number, "flood", "default", "standard", planned, planned + 2.0, 16, 8, attempts=[attempt])
    found.outcome = judge(found)
    return found


def test_what_was_admitted_and_late_counts_among_first_tokens_and_what_was_refused_does_not(rows):
    records = [
        record(0, Ending.COMPLETED, first_token=0.1, ended=1.0),
        record(1, Ending.COMPLETED, first_token=1.5, ended=2.5),
        record(2, Ending.DEADLINE_EXCEEDED, first_token=1.9, ended=2.0),
        record(3, Ending.DEADLINE_EXCEEDED, ended=2.25),
        record(4, Ending.REFUSED, ended=0.01),
    ]
    assert [one.outcome for one in records[:2]] == [Outcome.IN_TIME, Outcome.LATE]
    assert rows.admitted_ttft(columns_of(records)).tolist() == [0.1, 1.5, 1.9, 2.25]


@pytest.mark.parametrize(
    ("slow", "seconds"),
    [
        ([], 0.0),
        ([20, 21, 22], 2.0),  # One of five may be slow.
        ([25], 0.0),
        ([20, 60, 61], 41.0),
        ([20, 98, 99], math.inf),
    ],
)
def test_a_mesh_is_back_when_it_stays_as_usual(rows, slow, seconds):
    records = [
        record(number, Ending.COMPLETED, first_token=0.5 if number in slow else 0.1, planned=float(number))
        for number in range(100)
    ]
    assert rows.recovery_seconds(columns_of(records), 20.0, usual=0.2) == pytest.approx(seconds)


def test_the_error_of_a_told_wait_is_a_share_of_the_wait_that_came_and_short_waits_do_not_count():
    eta = module("overload_eta.py")
    told = [
        eta.Told(wait_seconds=3.0, left_seconds=2.0, first_token_seconds=2.5),
        eta.Told(wait_seconds=3.0, left_seconds=4.0, first_token_seconds=4.5),
        eta.Told(wait_seconds=3.0, left_seconds=0.4, first_token_seconds=0.9),
        eta.Told(wait_seconds=3.0, error="UNAVAILABLE: refused"),
        eta.Told(left_seconds=2.0, first_token_seconds=2.5),
    ]
    errors = eta.errors_of(told)
    assert (errors.of_wait, errors.waited, errors.late) == ([50.0, 25.0], [2.0, 4.0], 1)
    assert errors.of_first_token == pytest.approx([20.0, 100 / 3])


def compared(peers, share_by_hand: float, **results: tuple[float, float]) -> dict[str, tuple[float, float, bool]]:
    """Each row's figure and bound, and whether it holds; of goodput and realtime's share of each who ran."""
    table = sys.modules["table"].Table("")
    by_default, by_hand = (
        [each.name for each in peers.CONTENDERS if each.is_by_hand == is_by_hand] for is_by_hand in (False, True)
    )
    names = {"own": peers.TIDEGATE, "turns": by_default[0], "default": by_default[1]}
    names |= {"told": by_hand[0], "better": by_hand[1]}
    made = {names[who]: peers.Result(goodput, 1.0, 0.0, realtime, 0.5) for who, (goodput, realtime) in results.items()}
    peers.add_rows(table, peers.Contest("load", (), 20.0, share_by_hand, True), made)
    return {row.name.removeprefix("load: "): (row.figure, row.bound, row.holds) for row in table.rows}


def test_tidegate_is_held_to_the_best_of_each_kind(peers):
    none = math.nan
    others = {"turns": (30, none), "default": (48, none), "told": (90, none), "better": (100, none)}
    found = compared(peers, 0.95, own=(96, none), **others)
    assert found == {
        "TTFT against the best at its defaults": (1.0, 1.0, True),
        "goodput against the best at its defaults": (2.0, 1.0, True),
        "goodput against the best told by hand": (0.96, 0.95, True),
    }
    assert not compared(peers, 1.0, own=(96, none), told=(90, none), better=(100, none))[
        "goodput against the best told by hand"
    ][2]


def test_realtime_is_held_to_the_best_share_of_any_other_whatever_its_goodput(peers):
    found = compared(peers, 1.0, own=(100, 99.0), told=(90, 99.5), better=(95, 40.0))
    assert found["realtime in time against the best told by hand"] == (99.0, 99.5, False)


def test_the_capacity_for_equal_requests_follows_from_what_they_cost(peers):
    shape = Shape(prompt_tokens=ConstantLength(128), answer_tokens=ConstantLength(192))
    contests = {contest.name: contest for contest in peers.contests_of(20.0, shape, 30.0)}
    seconds = [peers.mean_cost_seconds(one) for one in (shape, peers.EQUAL)]
    assert contests["equal requests, 2 C"].capacity == pytest.approx(20.0 * seconds[0] / seconds[1])
    assert contests["mixed lengths, 10 C"].flows[0].arrivals.rate == 200.0
    assert sum(flow.arrivals.rate for flow in contests["tenants and classes, 5 C"].flows) == pytest.approx(100.0)
