"""One run in figures: the ledger's summary, for tables, JSON and the report's head. Pure."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from tidegate.bench.columns import Columns, columns_of
from tidegate.bench.ledger import Comparison, Ledger, Outcome, WorkerFigures
from tidegate.bench.statistics import jain_index, percentiles

LAG_WARNING_SECONDS: Final = 0.05
"""A P99 of lag above this says that the generator was the bottleneck."""

CORE_WARNING_SHARE: Final = 0.9
"""A worker that was busier than this share of one core says so too."""

FAIRNESS_WINDOW_SECONDS: Final = 10.0
"""Jain's index is taken of tokens in windows of this length; the report has the lowest and the mean."""


class Figures(msgspec.Struct, kw_only=True):
    """Of all requests, or of those of one class, tenant or flow. Times in seconds."""

    requests: int
    in_time: int
    goodput: float
    """Requests in time per second of the plan."""
    goodput_share: float
    """Of all requests, those in time."""
    offered: float
    """Planned requests per second."""
    tokens_per_second: float
    """Of answers in time."""
    outcomes: dict[str, int]
    refused: dict[str, int]
    """By reason."""
    ttft: dict[str, float]
    """Percentiles of what got a first token, from the planned time."""
    tpot: dict[str, float]
    latency: dict[str, float]
    """Of whole answers, from the planned time."""


class Summary(msgspec.Struct, kw_only=True):
    """One run."""

    name: str
    load: str
    seed: int
    duration_seconds: float
    all: Figures
    classes: dict[str, Figures]
    tenants: dict[str, Figures]
    flows: dict[str, Figures]
    attempts: int
    """Times that requests were sent, retries included."""
    refusal: dict[str, float]
    """Percentiles of how long a refusal took, from when the attempt was to be sent."""
    wasted_tokens: int
    wasted_token_share: float
    """Of all tokens that came, those of answers that were not in time."""
    jain_tokens_mean: float
    """Jain's index of the tenants' tokens, mean of windows of 10 s; 1 with one tenant."""
    jain_tokens_low: float
    """The lowest of the windows."""
    lag: dict[str, float]
    """Percentiles of how far behind its plan the generator sent."""
    workers: list[WorkerFigures]
    cpu_seconds_per_request: float
    """The generator's own."""
    failures: dict[str, int]
    """What went wrong, and how often; the commonest first, ten at most."""
    agreement: list[Comparison]
    warnings: list[str]


def summary(ledger: Ledger) -> Summary:
    """A ledger in figures."""
    columns = columns_of(ledger.records)
    seconds = ledger.duration_seconds
    came = int(sum(record.token_count for record in ledger.records))
    wasted = int(columns.wasted_tokens.sum())
    index = fairness(columns, seconds)
    cpu = sum(worker.cpu_seconds for worker in ledger.workers)
    lag = percentiles(columns.lag, (50, 99, 100))
    return Summary(
        name=ledger.name,
        load=ledger.plan.load.name,
        seed=ledger.plan.seed,
        duration_seconds=seconds,
        all=figures(columns, seconds),
        classes=_split(columns, columns.service_class, seconds),
        tenants=_split(columns, columns.tenant, seconds),
        flows=_split(columns, columns.flow, seconds),
        attempts=sum(len(record.attempts) for record in ledger.records),
        refusal=percentiles(columns.refusal_seconds),
        wasted_tokens=wasted,
        wasted_token_share=wasted / came if came else 0.0,
        jain_tokens_mean=float(np.mean(index)),
        jain_tokens_low=float(np.min(index)),
        lag=lag,
        workers=ledger.workers,
        cpu_seconds_per_request=cpu / max(1, len(ledger.records)),
        failures=_failures(ledger),
        agreement=ledger.agreement,
        warnings=warnings(ledger, lag),
    )


def figures(columns: Columns, seconds: float) -> Figures:
    """The figures of some requests."""
    in_time = columns.of(Outcome.IN_TIME)
    count = int(in_time.sum())
    refused = columns.reason[columns.of(Outcome.REFUSED)]
    got_tokens = ~columns.of(Outcome.LEFT)
    return Figures(
        requests=len(columns),
        in_time=count,
        goodput=count / seconds if seconds else 0.0,
        goodput_share=count / len(columns) if len(columns) else 0.0,
        offered=len(columns) / seconds if seconds else 0.0,
        tokens_per_second=float(columns.tokens[in_time].sum()) / seconds if seconds else 0.0,
        outcomes={outcome.value: int(columns.of(outcome).sum()) for outcome in Outcome if columns.of(outcome).any()},
        refused={str(reason): int((refused == reason).sum()) for reason in sorted(set(refused))},
        ttft=percentiles(columns.ttft[got_tokens]),
        tpot=percentiles(columns.tpot[got_tokens]),
        latency=percentiles(columns.latency),
    )


def fairness(columns: Columns, seconds: float, window: float = FAIRNESS_WINDOW_SECONDS) -> list[float]:
    """Jain's index of the tokens that each tenant got, window after window; a last one cut short is left out."""
    tenants = sorted(set(columns.tenant))
    windows = max(1, int(seconds / window + 1e-9))
    shares = []
    for number in range(windows):
        end = (number + 1) * window if windows > 1 else np.inf
        inside = (columns.ended >= number * window) & (columns.ended < end)
        shares.append([float(columns.tokens[inside & (columns.tenant == tenant)].sum()) for tenant in tenants])
    return [jain_index(each) for each in shares]


def warnings(ledger: Ledger, lag: dict[str, float]) -> list[str]:
    """Why a run's figures may not be the server's."""
    found = []
    if lag["p99"] > LAG_WARNING_SECONDS:
        found.append(
            f"the generator was behind its plan by {1000 * lag['p99']:.0f} ms (P99): it is the bottleneck, give it more"
            " workers or less to do"
        )
    found += [
        f"a worker used {worker.cpu_seconds / worker.wall_seconds:.0%} of a core: use more workers"
        for worker in ledger.workers
        if worker.cpu_seconds > CORE_WARNING_SHARE * worker.wall_seconds > 1.0
    ]
    not_sent = sum(record.outcome is Outcome.NOT_SENT for record in ledger.records)
    if not_sent:
        found.append(f"{not_sent} requests were not sent by the generator")
    found += [
        f"{each.name}: the server says {each.server}, the ledger {each.client_low} to {each.client_high}"
        for each in ledger.agreement
        if not each.agrees
    ]
    if ledger.samples and not ledger.agreement:
        found.append("the server's counts could not be read, or its scheduler began anew: they are not compared")
    if ledger.interrupted:
        found.append("the run was stopped before its end")
    return found


def _split(columns: Columns, names: np.ndarray, seconds: float) -> dict[str, Figures]:
    return {str(name): figures(columns.where(names == name), seconds) for name in sorted(set(names))}


def _failures(ledger: Ledger) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in ledger.records:
        if record.outcome in (Outcome.FAILED, Outcome.WRONG_TEXT) and record.last is not None:
            found[record.last.what] = found.get(record.last.what, 0) + 1
    return dict(sorted(found.items(), key=lambda pair: -pair[1])[:10])
