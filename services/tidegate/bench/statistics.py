"""Figures from numbers: percentiles, goodput, fairness. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9)


def percentile(values: ArrayLike, share: float) -> float:
    """The value that `share` percent of all are not above, from between two neighbours; NaN of nothing."""
    array = np.asarray(values, float)
    array = array[~np.isnan(array)]
    return float(np.percentile(array, share)) if len(array) else math.nan


def percentiles(values: ArrayLike, shares: Sequence[float] = PERCENTILES) -> dict[str, float]:
    """Several at once, by name: p50, p99.9."""
    return {f"p{share:g}": percentile(values, share) for share in shares}


def jain_index(shares: Iterable[float]) -> float:
    """Jain's fairness index: 1 when all have the same, 1/n when one has all; 1 when nobody has anything.

    Source: Jain, Chiu, Hawe, "A Quantitative Measure of Fairness and Discrimination", DEC-TR-301, 1984.
    """
    array = np.asarray(list(shares), float)
    squares = float(np.sum(array**2)) * len(array)
    return float(np.sum(array)) ** 2 / squares if squares else 1.0


def per_bucket(times: ArrayLike, end: float, width: float, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    """How many (or how much) per second, in buckets of `width` seconds over [0, end)."""
    edges = bucket_edges(end, width)
    counts, _ = np.histogram(np.asarray(times, float), edges, weights=None if weights is None else np.asarray(weights))
    return np.asarray(counts / width, np.float64)


def bucket_edges(end: float, width: float) -> NDArray[np.float64]:
    """The edges of the buckets that cover [0, end)."""
    return np.asarray(np.arange(max(1, math.ceil(end / width - 1e-9)) + 1) * width, np.float64)


def percentile_per_bucket(
    times: ArrayLike, values: ArrayLike, end: float, width: float, share: float
) -> NDArray[np.float64]:
    """A percentile of the values whose times fall into each bucket; NaN of none."""
    edges = bucket_edges(end, width)
    array, places = np.asarray(values, float), np.digitize(np.asarray(times, float), edges) - 1
    return np.array([percentile(array[places == bucket], share) for bucket in range(len(edges) - 1)])
