"""When requests are sent: open-loop arrival processes, pure functions of their settings and a random generator.

An open-loop process never waits for an answer; a closed one (`Closed`) is a number of users who do, and has no times
of its own. Times are seconds from the beginning of the flow, sorted.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

LARGEST_PLAN: Final = 5_000_000
"""Requests of one flow; a rate and a duration whose product is more are refused."""


class Poisson(msgspec.Struct, frozen=True, tag="poisson"):
    """Independent clients: exponential gaps."""

    rate: float
    """Requests per second."""


class Constant(msgspec.Struct, frozen=True, tag="constant"):
    """A metronome: equal gaps."""

    rate: float
    """Requests per second."""


class Bursts(msgspec.Struct, frozen=True, tag="bursts"):
    """Many at once, then nothing."""

    rate: float
    """Requests per second, on average; a burst has `rate * every_seconds` of them, rounded."""
    every_seconds: float
    """From the beginning of one burst to that of the next."""
    width_seconds: float = 0.0
    """A burst's requests are spread over so much time at random; 0 is all at the same moment."""


class Square(msgspec.Struct, frozen=True, tag="square"):
    """A square wave: Poisson at one rate, then at another, and again."""

    rate: float
    """Requests per second in the high half."""
    low_rate: float = 0.0
    """Requests per second in the low half."""
    high_seconds: float = 0.1
    low_seconds: float = 0.1


class Trace(msgspec.Struct, frozen=True, tag="trace"):
    """What was recorded somewhere; lengths come from the file too (see traces.py)."""

    path: str
    rate: float = 0.0
    """Requests per second that the trace is stretched or squeezed to, on average; 0 keeps its own time."""


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """A closed loop: each user asks, reads the answer, thinks, and asks again."""

    users: int
    think_seconds: float = 0.0
    """Mean of an exponential distribution; 0 is at once."""


Open = Poisson | Constant | Bursts | Square
Arrivals = Open | Trace | Closed


class PlanError(ValueError):
    """A load that cannot be planned; the message says which part and why."""


def times(arrivals: Open, duration_seconds: float, random: np.random.Generator) -> NDArray[np.float64]:
    """The planned times in [0, duration), sorted.

    Raises:
        PlanError: a negative rate, a period of no length, or too many requests.
    """
    _check(arrivals, duration_seconds)
    match arrivals:
        case Poisson():
            return _poisson(arrivals.rate, 0.0, duration_seconds, random)
        case Constant():
            return np.arange(round(arrivals.rate * duration_seconds)) / arrivals.rate if arrivals.rate else np.empty(0)
        case Bursts():
            return _bursts(arrivals, duration_seconds, random)
        case Square():
            return _square(arrivals, duration_seconds, random)


def _check(arrivals: Open, duration_seconds: float) -> None:
    rates = [arrivals.rate, arrivals.low_rate] if isinstance(arrivals, Square) else [arrivals.rate]
    if min(rates) < 0 or duration_seconds < 0:
        raise PlanError(f"{arrivals}: rates and durations are 0 or more")
    if max(rates) * duration_seconds > LARGEST_PLAN:
        raise PlanError(f"{arrivals} for {duration_seconds} s is more than {LARGEST_PLAN} requests")
    if isinstance(arrivals, Bursts) and arrivals.every_seconds <= 0:
        raise PlanError("bursts need a time between them above 0 s")
    if isinstance(arrivals, Square) and min(arrivals.high_seconds, arrivals.low_seconds) <= 0:
        raise PlanError("both halves of a square wave last longer than 0 s")


def _poisson(rate: float, begin: float, end: float, random: np.random.Generator) -> NDArray[np.float64]:
    # Given their number, the times of a Poisson process are uniform.
    count = random.poisson(rate * (end - begin))
    return np.sort(random.uniform(begin, end, count))


def _bursts(arrivals: Bursts, duration_seconds: float, random: np.random.Generator) -> NDArray[np.float64]:
    begins = np.arange(0.0, duration_seconds, arrivals.every_seconds)
    size = round(arrivals.rate * arrivals.every_seconds)
    all_times = np.repeat(begins, size) + random.uniform(0.0, 1.0, len(begins) * size) * arrivals.width_seconds
    return np.sort(all_times[all_times < duration_seconds])


def _square(arrivals: Square, duration_seconds: float, random: np.random.Generator) -> NDArray[np.float64]:
    pieces = []
    begin = 0.0
    while begin < duration_seconds:
        middle = min(begin + arrivals.high_seconds, duration_seconds)
        end = min(middle + arrivals.low_seconds, duration_seconds)
        pieces += [_poisson(arrivals.rate, begin, middle, random), _poisson(arrivals.low_rate, middle, end, random)]
        begin = begin + arrivals.high_seconds + arrivals.low_seconds
    return np.concatenate(pieces) if pieces else np.empty(0)
