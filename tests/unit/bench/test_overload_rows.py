"""What the overload benchmark reads from columns and metrics, and how it compares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tidegate.bench.columns import columns_of
from tidegate.bench.ledger import Attempt, Ending, Outcome, Record, judge

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def rows():
    return module("overload_rows")


def module(name: str):
    """A module of the benchmark's own folder, which is no package."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
        return found
    finally:
        sys.path.remove(str(BENCH))


def test_attempts_at_an_engine_are_all_it_began_and_all_that_went_on(rows):
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
    assert rows.engine_attempts(page) == 48


def record(number: int, ending: Ending, *, first_token: float | None = None, ended: float = 1.0) -> Record:
    """One request planned at 0 s, to be answered within 2 s."""
    attempt = Attempt(sent=0.0, ended=ended, ending=ending, first_token=first_token, last_token=first_token and ended)
    found = Record(number, "flood", "default", "standard", 0.0, 2.0, 16, 8, attempts=[attempt])
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


def test_the_error_of_a_told_wait_is_a_share_of_the_wait_that_came_and_short_waits_do_not_count():
    eta = module("overload_eta")
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
