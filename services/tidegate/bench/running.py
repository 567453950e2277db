"""Runs a plan against a target and returns its ledger: what a benchmark in Python calls.

async with Workers(2) as workers:
    ledger = await run(Plan(load=load, seed=1), Target(address=mesh.ingress), workers=workers)
print(summary(ledger).all.goodput)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from tidegate.bench.agreement import compare
from tidegate.bench.ledger import Comparison, Ledger, Record
from tidegate.bench.plan import Plan, check
from tidegate.bench.targets import Target
from tidegate.bench.watching import ServerCounts, Watcher, difference, read_counts, settled_counts
from tidegate.bench.workers import OnProgress, Workers


async def run(
    plan: Plan,
    target: Target,
    *,
    name: str = "",
    workers: Workers | int = 1,
    on_progress: OnProgress | None = None,
    stop: asyncio.Event | None = None,
) -> Ledger:
    """Runs a plan once.

    Args:
        name: what the run is called; empty: the target's name.
        workers: processes that are there already (for many runs), or how many to start for this one.
        on_progress: told how far it is, a few times a second.
        stop: when set, the run ends early and its ledger says so.

    Raises:
        PlanError: the plan cannot be run.
        WorkerFailed: the target does not answer, or a worker died.
    """
    check(plan.load)
    async with _ready_workers(workers) as ready:
        before = await read_counts(target)
        begin = _Begin()
        async with Watcher(target.scheduler_addresses, begin.now) as watcher:
            records, figures = await ready.run(plan, target, on_begin=begin.set, on_progress=on_progress, stop=stop)
        after = await settled_counts(target) if before is not None else None
    return Ledger(
        name=name or target.name,
        plan=plan,
        began_unix_seconds=begin.unix_seconds,
        duration_seconds=plan.load.duration_seconds,
        records=records,
        workers=figures,
        samples=[sample for sample in watcher.samples if sample.seconds >= 0],
        agreement=_agreement(records, before, after),
        interrupted=stop is not None and stop.is_set(),
    )


def _agreement(records: list[Record], before: ServerCounts | None, after: ServerCounts | None) -> list[Comparison]:
    if before is None or after is None or before.scheduler_id != after.scheduler_id:
        return []
    return compare(records, difference(before, after))


@contextlib.asynccontextmanager
async def _ready_workers(workers: Workers | int) -> AsyncIterator[Workers]:
    if isinstance(workers, Workers):
        yield workers
        return
    async with Workers(workers) as started:
        yield started


class _Begin:
    """The plan's time 0, once it is known."""

    def __init__(self) -> None:
        self._monotonic_seconds: float | None = None
        self.unix_seconds = time.time()

    def set(self, monotonic_seconds: float) -> None:
        self._monotonic_seconds = monotonic_seconds
        self.unix_seconds = time.time() + monotonic_seconds - time.monotonic()

    def now(self) -> float:
        return -1.0 if self._monotonic_seconds is None else time.monotonic() - self._monotonic_seconds
