"""Arrival processes and lengths: their rates, their shapes, and that a seed gives the same again."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.bench import arrivals, lengths
from tidegate.bench.arrivals import Bursts, Constant, PlanError, Poisson, Square
from tidegate.bench.lengths import ConstantLength, LogNormalLength, UniformLength


def random(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("process", [Poisson(40), Constant(40), Bursts(40, 0.5), Square(80, 0, 0.5, 0.5)])
def test_every_process_has_its_mean_rate_and_stays_inside_its_duration(process):
    times = arrivals.times(process, 200.0, random())
    assert len(times) == pytest.approx(40 * 200, rel=0.03)
    assert times[0] >= 0
    assert times[-1] < 200
    assert np.all(np.diff(times) >= 0)


def test_a_seed_gives_the_same_times_and_another_gives_others():
    first, second = (arrivals.times(Poisson(50), 10, random(1)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, arrivals.times(Poisson(50), 10, random(2)))


def test_poisson_gaps_vary_as_much_as_their_mean():
    gaps = np.diff(arrivals.times(Poisson(100), 300, random()))
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)


def test_constant_gaps_do_not_vary():
    assert arrivals.times(Constant(4), 1, random()).tolist() == [0, 0.25, 0.5, 0.75]


def test_a_burst_comes_at_one_moment_and_then_nothing():
    times = arrivals.times(Bursts(rate=5, every_seconds=2), 4, random())
    assert times.tolist() == [0.0] * 10 + [2.0] * 10


def test_a_square_wave_is_silent_in_its_low_half():
    times = arrivals.times(Square(rate=200, high_seconds=0.1, low_seconds=0.1), 10, random())
    assert np.all(times % 0.2 < 0.1)


@pytest.mark.parametrize("process", [Poisson(-1), Bursts(1, 0), Square(1, 0, 0, 1), Poisson(1e9)])
def test_what_cannot_be_planned_is_refused(process):
    with pytest.raises(PlanError):
        arrivals.times(process, 60, random())


def test_lengths_stay_within_their_bounds():
    drawn = lengths.draw(LogNormalLength(median=100, sigma=1.5, high=400, low=20), 5000, random())
    assert (drawn.min(), drawn.max()) == (20, 400)
    assert np.median(drawn) == pytest.approx(100, rel=0.1)
    assert set(lengths.draw(UniformLength(3, 5), 200, random()).tolist()) == {3, 4, 5}
    assert lengths.draw(ConstantLength(9), 3, random()).tolist() == [9, 9, 9]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128", ConstantLength(128)),
        ("uniform:16,256", UniformLength(16, 256)),
        ("lognormal:100,0.8,2000", LogNormalLength(100, 0.8, 2000)),
    ],
)
def test_lengths_of_the_command_line(text, expected):
    assert lengths.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "x", "uniform:5", "uniform:9,3", "normal:3,4", "lognormal:0,1,2"])
def test_lengths_that_make_no_sense_are_refused(text):
    with pytest.raises(PlanError):
        lengths.parse(text)
