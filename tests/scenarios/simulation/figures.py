"""What came of a run: the figures that policies are judged by, from the clients' own records."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from simulation.job import End, Job


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` to `end`, in seconds."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start

    def jobs(self, jobs: Iterable[Job]) -> list[Job]:
        """Those whose planned time lies in it."""
        return [job for job in jobs if self.start <= job.sent_at < self.end]


def goodput(jobs: Sequence[Job], window: Window) -> float:
    """Answers a second that were complete within their deadline, by when they were complete."""
    return sum(job.is_good and window.start <= (job.ended_at or 0.0) < window.end for job in jobs) / window.seconds


def good_share(jobs: Sequence[Job], window: Window) -> float:
    """Of those that were sent, the share that was complete within its deadline."""
    sent = window.jobs(jobs)
    return sum(job.is_good for job in sent) / max(1, len(sent))


def is_admitted(job: Job) -> bool:
    """Whether the mesh promised an answer; one whose client left by itself counts as neither."""
    return job.end is not End.REFUSED and (job.admitted_at is not None or job.first_token_at is not None)


def first_token_percentile(jobs: Sequence[Job], window: Window, share: float = 0.99) -> float:
    """Seconds to the first token of what was admitted; one that never got it counts with its whole wait."""
    waits = []
    for job in window.jobs(jobs):
        if is_admitted(job) and job.end is not End.LEFT:
            first = job.time_to_first_token_seconds
            waits.append(job.ended_at - job.sent_at if first is None and job.ended_at is not None else first or 0.0)
    return percentile(waits, share)


def wasted_share(jobs: Sequence[Job]) -> float:
    """Of all tokens that engines computed, those for requests that were not answered in time."""
    total = sum(job.token_count for job in jobs)
    return sum(job.token_count for job in jobs if not job.is_good) / max(1, total)


def ends(jobs: Iterable[Job]) -> Counter[str]:
    """How many ended in each way; `open` for those that did not."""
    return Counter("open" if job.end is None else job.end.value for job in jobs)


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 where all have the same, 1/n where one has it all (Jain, Chiu and Hawe, 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def tokens_by(jobs: Iterable[Job], key: Callable[[Job], str], window: Window) -> dict[str, int]:
    """Tokens that engines computed for each, by when the answer ended."""
    sums: dict[str, int] = defaultdict(int)
    for job in jobs:
        if job.ended_at is not None and window.start <= job.ended_at < window.end:
            sums[key(job)] += job.token_count
    return sums


def fairness(jobs: Sequence[Job], tenants: Sequence[str], window: Window, slice_seconds: float = 10.0) -> float:
    """The lowest Jain index of the tenants' tokens over any slice of the window."""
    lowest = 1.0
    for index in range(int(window.seconds // slice_seconds)):
        start = window.start + index * slice_seconds
        sums = tokens_by(jobs, lambda job: job.tenant, Window(start, start + slice_seconds))
        lowest = min(lowest, jain([sums.get(tenant, 0) for tenant in tenants]))
    return lowest


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; nan of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
