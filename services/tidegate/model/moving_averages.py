"""Averages that forget: what is older than the half-life counts half. Pure; time is an argument, in seconds."""

from __future__ import annotations

import math


class MovingAverage:
    """The mean of values, recent ones counting more."""

    def __init__(self, half_life_seconds: float) -> None:
        self._half_life_seconds = half_life_seconds
        self._sum = 0.0
        self._weight = 0.0
        self._at = 0.0

    def add(self, total: float, count: float, now: float) -> None:
        """Takes `count` values that add up to `total`."""
        fade = 0.5 ** (max(0.0, now - self._at) / self._half_life_seconds)
        self._sum = self._sum * fade + total
        self._weight = self._weight * fade + count
        self._at = now

    def value(self, now: float) -> float | None:
        """The mean; None before the first value.

        It falls towards zero while nothing comes: a replica that was slow once and is idle since must look worth a
        try again, or nothing would ever correct what is thought of it.
        """
        if self._weight <= 0:
            return None
        return float(self._sum / self._weight * 0.5 ** (max(0.0, now - self._at) / self._half_life_seconds))


class MovingRate:
    """Events a second, recent ones counting more."""

    def __init__(self, half_life_seconds: float, now: float) -> None:
        self._half_life_seconds = half_life_seconds
        self._mass = 0.0
        self._at = now

    def add(self, count: float, now: float) -> None:
        """Takes `count` events."""
        self._mass = self._mass * self._fade(now) + count
        self._at = max(self._at, now)

    def per_second(self, now: float) -> float:
        """The rate; it falls towards zero while nothing comes."""
        return self._mass * self._fade(now) * math.log(2) / self._half_life_seconds

    def _fade(self, now: float) -> float:
        return float(0.5 ** (max(0.0, now - self._at) / self._half_life_seconds))
