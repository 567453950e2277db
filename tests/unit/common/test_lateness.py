from __future__ import annotations

import pytest

from tidegate.common.lateness import CLOCK_WINDOW_SECONDS, Lateness, WindowedMinimum


def test_the_least_of_a_window_is_forgotten_after_it():
    least = WindowedMinimum(1.0)
    assert least.value(0.0) is None
    least.add(5, 0.0)
    least.add(3, 0.1)
    least.add(4, 0.6)
    assert least.value(0.9) == 3
    least.add(6, 1.2)
    assert least.value(1.2) == 4
    assert least.value(9.0) is None


@pytest.mark.parametrize("difference", [-3.0, 0.0, 7.0])
def test_a_difference_of_clocks_is_no_lateness(difference):
    lateness = Lateness()
    assert lateness.of(difference + 0.002, 0.0) == 0
    assert lateness.of(difference + 0.502, 1.0) == pytest.approx(0.5)
    assert lateness.of(difference + 0.002, 2.0) == pytest.approx(0)


def test_a_clock_that_is_set_is_believed_in_the_end():
    lateness = Lateness()
    lateness.of(0.0, 0.0)
    assert lateness.of(10.0, 1.0) == 10
    lateness.of(10.0, 1.0 + CLOCK_WINDOW_SECONDS)
    assert lateness.of(10.1, 2.0 + CLOCK_WINDOW_SECONDS) == pytest.approx(0.1)
