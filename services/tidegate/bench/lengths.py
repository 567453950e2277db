"""How long prompts and answers are, in tokens: distributions, drawn from a random generator that is given."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from tidegate.bench.arrivals import PlanError


class ConstantLength(msgspec.Struct, frozen=True, tag="constant"):
    """Always the same."""

    tokens: int


class UniformLength(msgspec.Struct, frozen=True, tag="uniform"):
    """Any of the whole range, ends included, equally likely."""

    low: int
    high: int


class LogNormalLength(msgspec.Struct, frozen=True, tag="lognormal"):
    """Most are short and a few are very long, as people's prompts and answers are."""

    median: int
    sigma: float
    """Standard deviation of the logarithm; 0.5 is mild, 1.2 has a long tail."""
    high: int
    """Longer ones are cut to this."""
    low: int = 1


Lengths = ConstantLength | UniformLength | LogNormalLength


def draw(lengths: Lengths, count: int, random: np.random.Generator) -> NDArray[np.int32]:
    """`count` lengths, each at least 1.

    Raises:
        PlanError: bounds that exclude each other.
    """
    match lengths:
        case ConstantLength():
            _require(lengths.tokens >= 1, lengths)
            return np.full(count, lengths.tokens, np.int32)
        case UniformLength():
            _require(1 <= lengths.low <= lengths.high, lengths)
            return random.integers(lengths.low, lengths.high + 1, count).astype(np.int32)
        case LogNormalLength():
            _require(1 <= lengths.low <= lengths.median <= lengths.high and lengths.sigma >= 0, lengths)
            drawn = random.lognormal(math.log(lengths.median), lengths.sigma, count)
            return np.clip(np.rint(drawn), lengths.low, lengths.high).astype(np.int32)


def parse(text: str) -> Lengths:
    """From the command line: `128`, `uniform:16,256`, or `lognormal:MEDIAN,SIGMA,MOST`.

    Raises:
        PlanError: anything else.
    """
    kind, _, numbers = text.rpartition(":")
    try:
        parts = [float(part) for part in numbers.split(",")]
        match kind, parts:
            case "" | "constant", [tokens]:
                found: Lengths = ConstantLength(int(tokens))
            case "uniform", [low, high]:
                found = UniformLength(int(low), int(high))
            case "lognormal", [median, sigma, high]:
                found = LogNormalLength(int(median), sigma, int(high))
            case _:
                raise PlanError(f"lengths are N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA,MOST, not {text!r}")
    except ValueError as error:
        raise PlanError(f"lengths {text!r}: {error}") from error
    draw(found, 0, np.random.default_rng(0))
    return found


def _require(holds: bool, lengths: Lengths) -> None:
    if not holds:
        raise PlanError(f"{lengths}: lengths are at least 1 token and the lower bound is not above the upper one")
