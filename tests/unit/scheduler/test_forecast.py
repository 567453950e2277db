from __future__ import annotations

import pytest

from tidegate.scheduler.forecast import LONGEST_MEMORY_SECONDS, DrainRate, expected_wait


def drain(rate, *, seconds, start=0.0, measured=None):
    """A measurement of `rate` dispatches a second for some seconds of backlog."""
    measured = measured or DrainRate(half_life_seconds=10)
    measured.set_backlog(True, start)
    for number in range(1, round(rate * seconds) + 1):
        measured.count_dispatch(start + number / rate)
    return measured


def test_nothing_is_known_at_the_start():
    assert DrainRate(10).rate(100) is None


def test_the_rate_is_what_left_in_a_second_of_backlog():
    assert drain(20, seconds=30).rate(30) == pytest.approx(20, rel=0.02)


def test_a_few_dispatches_are_not_a_rate():
    assert drain(2, seconds=2).rate(2) is None


def test_dispatches_without_a_backlog_do_not_count():
    measured = DrainRate(10)
    for number in range(100):
        measured.count_dispatch(number * 0.01)
    assert measured.rate(1) is None


def test_time_without_a_backlog_does_not_count():
    measured = drain(20, seconds=10)
    measured.set_backlog(False, 10)
    assert measured.rate(40) == pytest.approx(20, rel=0.05)
    drain(20, seconds=10, start=40, measured=measured)
    assert measured.rate(50) == pytest.approx(20, rel=0.05)


def test_a_new_rate_replaces_the_old_within_some_half_lives():
    measured = drain(40, seconds=20)
    drain(10, seconds=50, start=20, measured=measured)
    assert measured.rate(70) == pytest.approx(10, rel=0.1)


def test_a_rate_of_long_ago_is_not_known_any_more():
    measured = drain(20, seconds=10)
    measured.set_backlog(False, 10)
    assert measured.rate(10 + LONGEST_MEMORY_SECONDS) is not None
    assert measured.rate(11 + LONGEST_MEMORY_SECONDS) is None
    measured.set_backlog(True, 100)
    assert measured.rate(102) is None


def test_a_backlog_that_does_not_move_brings_the_rate_down():
    measured = drain(20, seconds=10)
    assert measured.rate(60) < 1


def test_asking_changes_nothing():
    measured = drain(20, seconds=10)
    assert measured.rate(30) == measured.rate(30)
    assert measured.rate(10) == pytest.approx(20, rel=0.05)


def test_waits_follow_from_the_rate():
    assert expected_wait(10, 5) == 2
    assert expected_wait(0, 5) == 0
    assert expected_wait(10, None) is None
    assert expected_wait(10, 0) == float("inf")
