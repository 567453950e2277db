"""A breaker a replica: what fails, or is far slower than the others, gets probes only. Pure; seconds are monotonic.

- *Closed*: it opens after `failure_limit` failures in a row, or `slow_limit` slow answers in a row. Slow is more than
  `slow_factor` times the T90 of the other replicas: the time that nine tenths (`slow_quantile`) of their recent answers
  kept, each divided by its size. One replica alone is never slow. A refusal says nothing, nor does a client that left.
- *Open*: nothing is sent for `open_seconds`, twice as long each time, up to `LONGEST_OPEN_SECONDS`.
- *Half-open*: at most `probe_limit` requests at once; as many good answers in a row close it, a bad one opens it.

Which replica serves when all of them are open is not decided here, but `reopens_at` says which is the least bad one.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

RECENT_COUNT: Final = 200
"""Answers of all replicas that are remembered."""

LEAST_COUNT: Final = 10
"""Answers of the others below which nothing is called slow."""

PROMPT_TOKEN_SHARE: Final = 1 / 16
"""A prompt's token is computed together with many others; this much of an answer's token is what it counts."""

LONGEST_OPEN_SECONDS: Final = 60.0

PROBE_SECONDS: Final = 60.0
"""A probe without an outcome for so long is forgotten, so that lost messages cannot keep a replica out."""


class Result(enum.Enum):
    """What an outcome says of the replica."""

    GOOD = enum.auto()
    FAILED = enum.auto()
    NOTHING = enum.auto()


class State(enum.Enum):
    """What may be sent."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerTerms:
    """The bounds of a breaker; a `slow_factor` of 0 judges failures alone."""

    failure_limit: int = 5
    slow_limit: int = 10
    slow_quantile: float = 0.9
    slow_factor: float = 1.2
    open_seconds: float = 5.0
    probe_limit: int = 2


@dataclass(slots=True)
class _Breaker:
    state: State = State.CLOSED
    reason: str = ""
    failure_count: int = 0
    slow_count: int = 0
    good_probe_count: int = 0
    open_count: int = 0
    reopens_at: float = 0.0
    closed_at: float = -math.inf
    probes: dict[str, float] = field(default_factory=dict)


def size_of(prompt_token_count: int, answer_token_count: int) -> float:
    """The size of a request's work, in tokens of an answer."""
    return max(1.0, answer_token_count + prompt_token_count * PROMPT_TOKEN_SHARE)


class Breakers:
    """The breakers of all replicas, by address."""

    def __init__(self, terms: BreakerTerms) -> None:
        self._terms = terms
        self._breakers: dict[str, _Breaker] = {}
        self._recent: deque[tuple[str, float]] = deque(maxlen=RECENT_COUNT)

    def keep(self, addresses: set[str]) -> None:
        """Forgets replicas that are gone."""
        for address in self._breakers.keys() - addresses:
            del self._breakers[address]

    def state(self, address: str, now: float) -> State:
        """What may be sent there."""
        breaker = self._breakers.get(address)
        if breaker is None:
            return State.CLOSED
        if breaker.state is State.OPEN and now >= breaker.reopens_at:
            return State.HALF_OPEN
        return breaker.state

    def reason(self, address: str) -> str:
        """Why it opened last; empty: it never did."""
        breaker = self._breakers.get(address)
        return "" if breaker is None else breaker.reason

    def can_send(self, address: str, now: float) -> bool:
        """Whether one more request may go there."""
        match self.state(address, now):
            case State.CLOSED:
                return True
            case State.OPEN:
                return False
        return len(self._live_probes(address, now)) < self._terms.probe_limit

    def reopens_at(self, address: str) -> float:
        """When an open one takes probes again; the earliest is the least bad."""
        return self._breakers[address].reopens_at if address in self._breakers else 0.0

    def closed_at(self, address: str) -> float:
        """When it closed last, after it had been open; minus infinity for one that never opened."""
        return self._breakers[address].closed_at if address in self._breakers else -math.inf

    def send(self, address: str, credit_id: str, now: float) -> None:
        """A request goes there."""
        if self.state(address, now) is State.HALF_OPEN:
            self._breakers[address].state = State.HALF_OPEN
            self._live_probes(address, now)[credit_id] = now

    def unsend(self, address: str, credit_id: str) -> None:
        """A request was not sent after all, or nothing is to be learnt from it."""
        if address in self._breakers:
            self._breakers[address].probes.pop(credit_id, None)

    def note(
        self, address: str, credit_id: str, result: Result, now: float, *, seconds: float = 0.0, size: float = 0.0
    ) -> None:
        """A request ended.

        Args:
            seconds: how long its answer took; 0 where that says nothing.
            size: of its work, as `size_of` has it.
        """
        breaker = self._breakers.setdefault(address, _Breaker())
        was_probe = breaker.probes.pop(credit_id, None) is not None
        if result is Result.NOTHING:
            return
        is_slow = False
        if result is Result.GOOD and seconds > 0 and size > 0:
            is_slow = self._is_slow(address, seconds / size)
            self._recent.append((address, seconds / size))
        breaker.failure_count = breaker.failure_count + 1 if result is Result.FAILED else 0
        breaker.slow_count = breaker.slow_count + 1 if is_slow else 0
        if breaker.state is State.CLOSED:
            self._judge(address, breaker, now)
        elif was_probe:
            self._judge_probe(address, breaker, now, is_good=result is Result.GOOD and not is_slow)

    def _judge(self, address: str, breaker: _Breaker, now: float) -> None:
        if breaker.failure_count >= self._terms.failure_limit:
            self._open(address, breaker, f"{breaker.failure_count} failures in a row", now)
        elif breaker.slow_count >= self._terms.slow_limit:
            self._open(
                address, breaker, f"{breaker.slow_count} answers in a row far slower than the other replicas'", now
            )

    def _judge_probe(self, address: str, breaker: _Breaker, now: float, *, is_good: bool) -> None:
        if not is_good:
            self._open(address, breaker, "a probe failed" if breaker.failure_count else "a probe was slow", now)
            return
        breaker.good_probe_count += 1
        if breaker.good_probe_count >= self._terms.probe_limit:
            breaker.state = State.CLOSED
            breaker.closed_at = now
            breaker.open_count = 0

    def _open(self, address: str, breaker: _Breaker, reason: str, now: float) -> None:
        seconds = min(LONGEST_OPEN_SECONDS, self._terms.open_seconds * 2.0 ** min(breaker.open_count, 16))
        breaker.state, breaker.reason, breaker.reopens_at = State.OPEN, reason, now + seconds
        breaker.open_count += 1
        breaker.failure_count = breaker.slow_count = breaker.good_probe_count = 0
        breaker.probes.clear()
        # What it was must not keep the others' T90 up, and must not be held against it when it returns.
        self._recent = deque((one for one in self._recent if one[0] != address), maxlen=RECENT_COUNT)

    def _is_slow(self, address: str, time: float) -> bool:
        if self._terms.slow_factor <= 0:
            return False
        others = sorted(each for other, each in self._recent if other != address)
        if len(others) < LEAST_COUNT:
            return False
        place = min(len(others) - 1, int(len(others) * self._terms.slow_quantile))
        return time > self._terms.slow_factor * others[place]

    def _live_probes(self, address: str, now: float) -> dict[str, float]:
        breaker = self._breakers[address]
        breaker.probes = {key: sent_at for key, sent_at in breaker.probes.items() if now - sent_at < PROBE_SECONDS}
        return breaker.probes
