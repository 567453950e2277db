"""The pictures of a run, from its ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tidegate.bench.columns import Columns, columns_of
from tidegate.bench.ledger import Ending, Ledger, Outcome
from tidegate.bench.report import axes
from tidegate.bench.report.charts import Chart, Series
from tidegate.bench.statistics import bucket_edges, per_bucket, percentile, percentile_per_bucket

BUCKETS: Final = 100
"""About so many points in time a picture."""

BUCKET_REQUESTS: Final = 5
"""At low rates buckets are wider, so that each has about so many requests."""

LARGEST_STACK: Final = 9
"""Tenants or reasons with a colour of their own; the rest is one more."""

OUTCOMES: Final = (
    (Outcome.IN_TIME, "in time", "good"),
    (Outcome.LATE, "late", "late"),
    (Outcome.WRONG_TEXT, "wrong text", "wrong"),
    (Outcome.REFUSED, "refused", "refused"),
    (Outcome.DEADLINE_EXCEEDED, "deadline exceeded", "missed"),
    (Outcome.FAILED, "failed", "failed"),
    (Outcome.LEFT, "client left", "left"),
    (Outcome.NOT_SENT, "not sent", "left"),
)

LANES: Final = (("realtime", "c1"), ("standard", "c2"), ("batch", "c3"))

LAST_STEP: Final = 5
"""Of the brownout's ladder, as Snapshot has it."""


@dataclass(frozen=True)
class Run:
    """A ledger made ready to be drawn."""

    ledger: Ledger
    columns: Columns
    width: float
    """Of a bucket, in seconds."""
    end: float
    """Of the time axis: the last answer."""

    @property
    def middles(self) -> list[float]:
        """The middle of each bucket."""
        edges = bucket_edges(self.end, self.width)
        return [float(each) for each in (edges[:-1] + edges[1:]) / 2]


@dataclass(frozen=True)
class Picture:
    """One kind of picture: what it shows, and how it is made of a run."""

    title: str
    text: str
    draw: Callable[[Run], Chart]


def prepare(ledger: Ledger) -> Run:
    """Makes a ledger ready."""
    columns = columns_of(ledger.records)
    last = float(np.nanmax(columns.ended)) if np.isfinite(columns.ended).any() else 0.0
    end = max(ledger.duration_seconds, last, 1.0)
    width = max(0.25, axes.nice(end / BUCKETS), axes.nice(end * BUCKET_REQUESTS / max(1, len(columns))))
    return Run(ledger, columns, width, end)


def outcomes(run: Run, capacity: float | None = None) -> Chart:
    """What became of the requests, at the time for which they were planned."""
    layers = [
        Series(name, _rate(run, run.columns.planned[run.columns.of(outcome)]), colour)
        for outcome, name, colour in OUTCOMES
    ]
    levels = [("C", capacity)] if capacity else []
    return Chart(xs=run.middles, layers=layers, levels=levels)


def goodput(run: Run) -> Chart:
    """Good answers at the time when they were complete, beside what was offered then."""
    in_time = run.columns.of(Outcome.IN_TIME)
    return Chart(
        xs=run.middles,
        lines=[
            Series("offered", _rate(run, run.columns.planned), "muted", dashed=True),
            Series("in time", _rate(run, run.columns.ended[in_time]), "good"),
        ],
    )


def ttft(run: Run) -> Chart:
    """Time to the first token over time."""
    return _percentile_lines(run, run.columns.ttft)


def tpot(run: Run) -> Chart:
    """Time of each further token over time."""
    return _percentile_lines(run, run.columns.tpot)


def distribution(run: Run) -> Chart:
    """How many had at most which time."""
    shares = [1, *range(5, 100, 5), 97, 98, 99, 99.5, 99.9, 100]
    lines = []
    xs: list[float] = []
    for name, values, colour in (("TTFT", run.columns.ttft, "c1"), ("TPOT", run.columns.tpot, "c4")):
        times = [percentile(values, share) for share in shares]
        lines.append((name, times, colour))
        xs += [time for time in times if math.isfinite(time) and time > 0]
    grid = sorted(set(xs)) or [1.0]
    series = [Series(name, [_share_at(time, times, shares) for time in grid], colour) for name, times, colour in lines]
    return Chart(xs=grid, lines=series, x_is_logarithmic=True, x_text=axes.seconds, x_name="", y_text=_percent,
                 y_values=[1.0])  # fmt: skip


def tenants(run: Run) -> Chart:
    """Each tenant's share of the tokens that came."""
    names = _largest(run.columns.tenant, run.columns.tokens)
    weights = np.where(np.isin(run.columns.outcome, (Outcome.REFUSED.value,)), 0, run.columns.tokens)
    rates = {name: _rate(run, *_pick(run, run.columns.tenant == name, weights)) for name in names}
    rest = ~np.isin(run.columns.tenant, names)
    if rest.any():
        rates["others"] = _rate(run, *_pick(run, rest, weights))
    totals = [sum(column) for column in zip(*rates.values(), strict=True)]
    layers = [
        Series(name, [y / total if total else math.nan for y, total in zip(ys, totals, strict=True)], f"c{number}")
        for number, (name, ys) in enumerate(rates.items(), start=1)
    ]
    return Chart(xs=run.middles, layers=layers, y_text=_percent, y_values=[1.0])


def refusals(run: Run) -> Chart:
    """Refused attempts by reason, at the time when they were refused."""
    refused = [
        (attempt.ended, attempt.reason)
        for record in run.ledger.records
        for attempt in record.attempts
        if attempt.ending is Ending.REFUSED
    ]
    times = np.array([time for time, _ in refused])
    reasons = np.array([reason for _, reason in refused], object)
    names = _largest(reasons, np.ones(len(reasons)))
    layers = [
        Series(name, _rate(run, times[reasons == name]), f"c{number}") for number, name in enumerate(names, start=1)
    ]
    return Chart(xs=run.middles, layers=layers or [Series("none", [math.nan] * len(run.middles), "c1")])


def queues(run: Run) -> Chart:
    """Requests that wait in the scheduler, by lane."""
    samples = run.ledger.samples
    layers = [
        Series(name, [float(sample.waiting.get(name, 0)) for sample in samples], colour) for name, colour in LANES
    ]
    return _sampled(run, layers=layers)


def engines(run: Run) -> Chart:
    """What the engines do, and the ladder's step."""
    samples = run.ledger.samples
    lines = [
        Series("answers under way", [float(sample.running) for sample in samples], "c1"),
        Series("credits not spent", [float(sample.credits) for sample in samples], "c3"),
    ]
    return _sampled(run, lines=lines)


def shed_level(run: Run) -> Chart:
    """What Envoy refuses for the scheduler, and the step of the brownout ladder."""
    samples = run.ledger.samples
    step = Series("brownout, a fifth each step", [sample.brownout_step / LAST_STEP for sample in samples], "missed")
    lines = [
        Series(f"{name} refused by Envoy", [sample.shed.get(name, 0.0) for sample in samples], colour)
        for name, colour in LANES
    ]
    return replace(_sampled(run, layers=[step], lines=lines), y_text=_percent, y_values=[1.0])


def limited_tenants(run: Run) -> Chart:
    """Tenants whose requests Envoy holds to a rate."""
    line = Series("tenants", [float(sample.limited_tenants) for sample in run.ledger.samples], "c1")
    return _sampled(run, layers=[line])


PICTURES: Final = (
    Picture("What became of the requests", "per second, at the moment for which they were planned", outcomes),
    Picture("Goodput", "answers per second that were whole, right and in time, when they were complete", goodput),
    Picture("Time to first token", "from the planned moment, at that moment", ttft),
    Picture("Time per output token", "of the tokens after the first", tpot),
    Picture("Distribution", "share of the answers that took at most so long", distribution),
    Picture("Shares by tenant", "of the tokens that came", tenants),
    Picture("Refusals by reason", "attempts per second, retries included", refusals),
    Picture("Queue by lane", "requests that wait in the scheduler", queues),
    Picture("Engines", "answers being generated, and credits that nobody has spent", engines),
    Picture(
        "Shed level",
        "what Envoy refuses by lot before it asks the scheduler, and how far up the brownout's ladder is",
        shed_level,
    ),
    Picture("Limited tenants", "those that Envoy holds to a rate, for nearly all they ask is refused", limited_tenants),
)


def side_by_side(picture: Picture, runs: Sequence[Run], capacity: float | None) -> list[Chart]:
    """One chart a run, on the same scale."""
    charts = [outcomes(run, capacity) if picture.draw is outcomes else picture.draw(run) for run in runs]
    heights = [height for chart in charts for height in chart.heights() if math.isfinite(height)]
    return [replace(chart, y_values=[*chart.y_values, *heights]) for chart in charts]


def _sampled(run: Run, *, layers: Sequence[Series] = (), lines: Sequence[Series] = ()) -> Chart:
    """What the scheduler said of itself, from sample to sample; nothing where it was not asked."""
    samples = run.ledger.samples
    if not samples:
        layers = lines = ()
    return Chart(xs=[sample.seconds for sample in samples] or [0.0], layers=layers, lines=lines, steps=True)


def _percentile_lines(run: Run, values: NDArray[np.float64]) -> Chart:
    lines = [
        Series(
            f"p{share:g}",
            [float(y) for y in percentile_per_bucket(run.columns.planned, values, run.end, run.width, share)],
            colour,
        )
        for share, colour in ((99, "c5"), (95, "c4"), (50, "c1"))
    ]
    return Chart(xs=run.middles, lines=lines, y_is_logarithmic=True, y_text=axes.seconds)


def _rate(run: Run, times: NDArray[np.float64], weights: NDArray[Any] | None = None) -> list[float]:
    return [float(each) for each in per_bucket(times, run.end, run.width, weights)]


def _pick(run: Run, rows: NDArray[np.bool_], weights: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[Any]]:
    rows = rows & np.isfinite(run.columns.ended)
    return run.columns.ended[rows], weights[rows]


def _largest(names: NDArray[Any], weights: NDArray[Any]) -> list[str]:
    totals = {str(name): float(weights[names == name].sum()) for name in set(names)}
    largest = sorted(totals, key=lambda name: -totals[name])[:LARGEST_STACK]
    return sorted(largest)


def _share_at(time: float, times: Sequence[float], shares: Sequence[float]) -> float:
    if not math.isfinite(times[0]):
        return math.nan
    return float(np.interp(time, times, shares, left=0.0, right=100.0)) / 100


def _percent(value: float) -> str:
    return f"{value:.0%}"
