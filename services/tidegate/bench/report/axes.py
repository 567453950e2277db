"""Where things stand in a chart: scales from values to places, and the values that are written at the axes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_NICE: Final = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """From values to places along one axis, linear or logarithmic; values outside stand at the edge."""

    low: float
    high: float
    begin: float
    """The place of `low`."""
    end: float
    """The place of `high`."""
    is_logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value stands."""
        value = min(max(value, self.low), self.high)
        if self.is_logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """The values to write at the axis."""
        return _powers(self.low, self.high) if self.is_logarithmic else _steps(self.low, self.high)


def linear(values: Sequence[float], begin: float, end: float) -> Scale:
    """From 0 to a round number above all values; NaN does not count."""
    highest = max((value for value in values if math.isfinite(value)), default=0.0)
    step = nice(max(highest, 1e-9) / 4)
    return Scale(0.0, step * max(1, math.ceil(highest / step - 1e-9)), begin, end)


def logarithmic(values: Sequence[float], begin: float, end: float) -> Scale:
    """From one round power to another around all values above 0."""
    positive = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(positive)))
    high = 10.0 ** math.ceil(math.log10(max(positive)))
    return Scale(low, high if high > low else low * 10, begin, end, is_logarithmic=True)


def nice(value: float) -> float:
    """The next round number: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _NICE if step * power >= value * (1 - 1e-9))


def short(value: float) -> str:
    """A number for an axis."""
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if value < 1000 else f"{value:g}"


def seconds(value: float) -> str:
    """A time for an axis."""
    return f"{value * 1000:g} ms" if value < 1 else f"{value:g} s"


def _steps(low: float, high: float) -> list[float]:
    step = nice((high - low) / 4)
    count = int((high - low) / step + 1e-9)
    return [low + number * step for number in range(count + 1)]


def _powers(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]
