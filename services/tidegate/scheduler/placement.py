"""Which replica takes a request: the lowest score among those with a credit. Pure.

score = latency_weight * latency + queue_weight * queue + prefix_weight * missing, each between 0 (best candidate) and
1 (worst). *latency* is the expected time of the answer there, *queue* what it runs and lets wait, in shares of its
slots, *missing* the share of the prompt that it would have to compute although another replica holds it.

Other policies order the candidates by less, for comparison and for very many replicas; see `Policy`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.scheduler.replica_table import Replica

SMALLEST_SPREAD_SHARE: Final = 0.25
"""Candidates nearer to each other than this share of the worst are told apart in proportion only: without it,
min-max normalization would make a difference of one per cent, which is noise, as large as one of ten times."""

SMALLEST_QUEUE_SPREAD: Final = 0.25
"""Of the slots. One request more on an engine of 32 says little: where it is the only one, as often as not it has
ended and its replica has not said so yet."""


class Policy(enum.Enum):
    """How candidates are ordered."""

    SCORE = "score"
    """By score, all of them."""
    TWO_CHOICES = "two_choices"
    """The better of two that are drawn comes first (Mitzenmacher 2001); the others follow in no order."""
    ROUND_ROBIN = "round_robin"
    """In turn, whatever they do."""
    LEAST_REQUEST = "least_request"
    """By the requests there."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What each part of the score counts."""

    latency: float
    queue: float
    prefix: float = 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and the credit it spends there; `alternatives` are the next best, in order.

    `is_owed`: its class's floor pays for it.
    """

    address: str
    credit_id: str
    alternatives: tuple[str, ...]
    is_owed: bool = False


def scores(
    replicas: Sequence[Replica], weights: Weights, answer_token_count: int, prefix_shares: Sequence[float] = ()
) -> list[float]:
    """The score of each candidate, for an answer of this length; lower is better.

    Args:
        prefix_shares: how much of the prompt each probably holds, 0 to 1; empty: nothing is known.
    """
    latencies = _normalized([_latency_seconds(replica, answer_token_count) for replica in replicas])
    queues = _normalized([_queue_share(replica) for replica in replicas], SMALLEST_QUEUE_SPREAD)
    missing = _missing(replicas, prefix_shares) if weights.prefix and prefix_shares else [0.0] * len(replicas)
    return [
        weights.latency * latency + weights.queue * queue + weights.prefix * absent
        for latency, queue, absent in zip(latencies, queues, missing, strict=True)
    ]


def order(
    replicas: Sequence[Replica],
    weights: Weights,
    answer_token_count: int,
    *,
    policy: Policy = Policy.SCORE,
    random_index: Callable[[int], int] = lambda count: 0,
    prefix_shares: Sequence[float] = (),
) -> list[Replica]:
    """The candidates, best first; equal ones in turn, the one that was chosen longest ago first.

    Args:
        random_index: draws a number from 0 to below its argument, for `TWO_CHOICES`.
    """
    if len(replicas) == 1:
        return list(replicas)
    match policy:
        case Policy.ROUND_ROBIN:
            return sorted(replicas, key=lambda replica: replica.dispatch_number)
        case Policy.LEAST_REQUEST:
            return sorted(replicas, key=lambda replica: (replica.busy_count, replica.dispatch_number))
        case Policy.TWO_CHOICES if len(replicas) > 2:
            first = random_index(len(replicas))
            second = (first + 1 + random_index(len(replicas) - 1)) % len(replicas)
            drawn = [replicas[first], replicas[second]]
            shares = [prefix_shares[first], prefix_shares[second]] if prefix_shares else ()
            rest = [replica for replica in replicas if replica not in drawn]
            return order(drawn, weights, answer_token_count, prefix_shares=shares) + rest
    scored = zip(scores(replicas, weights, answer_token_count, prefix_shares), replicas, strict=True)
    return [replica for _, replica in sorted(scored, key=lambda pair: (pair[0], pair[1].dispatch_number))]


def choose(ordered: Iterable[Replica], now: float, *, urgent: bool = False) -> Replica | None:
    """The best one that has a credit to spend; for an urgent request, before one where a batch request is paused."""
    urgent_choice = None
    for replica in ordered:
        if replica.book.can_spend(now):
            return replica
        if urgent and urgent_choice is None and replica.book.can_spend(now, urgent=True):
            urgent_choice = replica
    return urgent_choice


def _latency_seconds(replica: Replica, answer_token_count: int) -> float:
    load = replica.load
    assert load is not None
    return load.time_to_first_token_seconds + answer_token_count * load.seconds_per_output_token


def _queue_share(replica: Replica) -> float:
    assert replica.load is not None
    return replica.busy_count / max(1, replica.load.slot_count)


def _missing(replicas: Sequence[Replica], prefix_shares: Sequence[float]) -> list[float]:
    reused = [
        share if replica.load is not None and replica.load.reuses_prefixes else 0.0
        for replica, share in zip(replicas, prefix_shares, strict=True)
    ]
    most = max(reused, default=0.0)
    return [most - share for share in reused]


def _normalized(values: Sequence[float], smallest_spread: float = 0.0) -> list[float]:
    lowest, highest = min(values, default=0.0), max(values, default=0.0)
    spread = max(highest - lowest, highest * SMALLEST_SPREAD_SHARE, smallest_spread)
    if spread <= 0:
        return [0.0] * len(values)
    return [(value - lowest) / spread for value in values]
