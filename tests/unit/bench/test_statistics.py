"""Figures from numbers, against numpy and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tidegate.bench import statistics


def test_percentiles_are_numpys_and_leave_out_what_is_missing():
    values = np.random.default_rng(5).exponential(2.0, 1001)
    with_gaps = np.insert(values, [3, 500], np.nan)
    for share in (0, 50, 99, 99.9, 100):
        assert statistics.percentile(with_gaps, share) == np.percentile(values, share)
    assert list(statistics.percentiles(values)) == ["p50", "p90", "p95", "p99", "p99.9"]


def test_a_percentile_of_nothing_is_not_a_number():
    assert math.isnan(statistics.percentile([], 50))
    assert math.isnan(statistics.percentile([math.nan], 50))


@pytest.mark.parametrize(
    ("shares", "expected"), [([5, 5, 5, 5], 1), ([9, 0, 0], 1 / 3), ([1, 2], 0.9), ([0, 0], 1), ([], 1)]
)
def test_jains_index(shares, expected):
    assert statistics.jain_index(shares) == pytest.approx(expected)


def test_buckets_count_per_second_and_cover_the_end():
    times = [0.1, 0.4, 0.6, 1.9, 2.4]
    assert statistics.per_bucket(times, 2.5, 0.5).tolist() == [4, 2, 0, 2, 2]
    assert statistics.per_bucket(times, 2.5, 0.5, weights=[1, 1, 1, 1, 10]).tolist() == [4, 2, 0, 2, 20]


def test_percentiles_by_bucket():
    found = statistics.percentile_per_bucket([0.1, 0.2, 2.5], [1.0, 3.0, 7.0], 3, 1, 50)
    assert found[[0, 2]].tolist() == [2, 7]
    assert math.isnan(found[1])
