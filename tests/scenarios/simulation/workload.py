"""Who asks for what, and when: streams of attempts in the order of their planned times, each a function of its seed.

Open loop throughout: a client sends when it planned to, whatever became of the others.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from simulation.job import Job
from tidegate.scheduler.request import ServiceClass

Lengths = Callable[[random.Random], int]


def fixed(count: int) -> Lengths:
    """Always so many tokens."""
    return lambda dice: count


HUNDRED = fixed(100)
TWENTY = fixed(20)


def lognormal(mean: float, sigma: float, most: int) -> Lengths:
    """A long tail, as prompts and answers of real services have it; `sigma` is that of the logarithm."""
    mu = math.log(mean) - sigma * sigma / 2
    return lambda dice: max(1, min(most, round(dice.lognormvariate(mu, sigma))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of client.

    Args:
        says_length: its requests ask for as many tokens as their answers have, rather than for `max_tokens`.
        leave_share: of its requests, those whose client leaves at a random moment of the first `leave_within_seconds`.
    """

    name: str = "r"
    tenant: str = "one"
    service_class: ServiceClass = ServiceClass.STANDARD
    prompt: Lengths = HUNDRED
    answer: Lengths = TWENTY
    max_tokens: int = 256
    says_length: bool = False
    deadline_seconds: float | None = 2.0
    leave_share: float = 0.0
    leave_within_seconds: float = 1.0

    def job(self, number: int, sent_at: float, dice: random.Random) -> Job:
        """One request of it."""
        leaves = self.leave_share > 0 and dice.random() < self.leave_share
        prompt, answer = self.prompt(dice), self.answer(dice)
        return Job(
            f"{self.name}-{number}",
            sent_at,
            prompt,
            answer,
            answer if self.says_length else self.max_tokens,
            self.tenant,
            self.service_class,
            self.deadline_seconds,
            dice.random() * self.leave_within_seconds if leaves else None,
        )

    def with_(self, **changes: object) -> Kind:
        """The same, but for these."""
        return replace(self, **changes)  # type: ignore[arg-type]


def poisson(kind: Kind, rate: float, start: float, seconds: float, seed: int) -> Iterator[Job]:
    """Independent arrivals, `rate` a second on average."""
    dice = random.Random(f"{seed}/{kind.name}/{start}")
    at, number = start, 0
    while rate > 0:
        at += dice.expovariate(rate)
        if at >= start + seconds:
            return
        yield kind.job(number, at, dice)
        number += 1


def square_wave(
    kind: Kind, high: float, low: float, half_period_seconds: float, start: float, seconds: float, seed: int
) -> Iterator[Job]:
    """Poisson arrivals whose rate jumps between `high` and `low`, each for half a period."""
    for period in range(math.ceil(seconds / half_period_seconds)):
        begin = start + period * half_period_seconds
        part = kind.with_(name=f"{kind.name}{period}")
        yield from poisson(part, low if period % 2 else high, begin, half_period_seconds, seed)


def burst(kind: Kind, count: int, start: float, seconds: float, seed: int) -> Iterator[Job]:
    """So many requests within a short time, evenly at random."""
    dice = random.Random(f"{seed}/{kind.name}/{start}")
    times = sorted(start + dice.random() * seconds for _ in range(count))
    return (kind.job(number, at, dice) for number, at in enumerate(times))


def together(*streams: Iterable[Job]) -> Iterator[Job]:
    """Several at once, in order of time."""
    return heapq.merge(*streams, key=lambda job: job.sent_at)
