"""Which replica takes a request: the lowest score among those with a credit. Pure.

score = latency_weight * latency + queue_weight * queue, each between 0 (best candidate) and 1 (worst).
*latency* is the expected time of the answer there, *queue* what it runs and lets wait, in shares of its slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.scheduler.replica_table import Replica

SMALLEST_SPREAD_SHARE: Final = 0.25
"""Candidates nearer to each other than this share of the worst are told apart in proportion only: without it,
min-max normalization would make a difference of one per cent, which is noise, as large as one of ten times."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What each part of the score counts."""

    latency: float
    queue: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and the credit it spends there; `alternatives` are the next best, in order."""

    address: str
    credit_id: str
    alternatives: tuple[str, ...]


def scores(replicas: Sequence[Replica], weights: Weights, answer_token_count: int) -> list[float]:
    """The score of each candidate, for an answer of this length; lower is better."""
    latencies = _normalized([_latency_seconds(replica, answer_token_count) for replica in replicas])
    queues = _normalized([_queue_share(replica) for replica in replicas])
    return [weights.latency * latency + weights.queue * queue for latency, queue in zip(latencies, queues, strict=True)]


def order(replicas: Sequence[Replica], weights: Weights, answer_token_count: int) -> list[Replica]:
    """The candidates, best first; equal ones in turn, the one that was chosen longest ago first."""
    if len(replicas) == 1:
        return list(replicas)
    scored = zip(scores(replicas, weights, answer_token_count), replicas, strict=True)
    return [replica for _, replica in sorted(scored, key=lambda pair: (pair[0], pair[1].dispatch_number))]


def choose(ordered: Iterable[Replica], now: float) -> Replica | None:
    """The best one that has a credit to spend."""
    return next((replica for replica in ordered if replica.book.can_spend(now)), None)


def _latency_seconds(replica: Replica, answer_token_count: int) -> float:
    load = replica.load
    assert load is not None
    return load.time_to_first_token_seconds + answer_token_count * load.seconds_per_output_token


def _queue_share(replica: Replica) -> float:
    assert replica.load is not None
    return replica.busy_count / max(1, replica.load.slot_count)


def _normalized(values: Sequence[float]) -> list[float]:
    lowest, highest = min(values, default=0.0), max(values, default=0.0)
    spread = max(highest - lowest, highest * SMALLEST_SPREAD_SHARE)
    if spread <= 0:
        return [0.0] * len(values)
    return [(value - lowest) / spread for value in values]
