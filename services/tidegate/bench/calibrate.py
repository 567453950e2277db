"""Measures the capacity C of a target by short runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from tidegate.bench.arrivals import Closed
from tidegate.bench.capacity import CapacitySearch
from tidegate.bench.columns import columns_of
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Outcome
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.scenarios import Shape, baseline
from tidegate.bench.targets import Target
from tidegate.bench.workers import Workers

FIRST_USERS: Final = 64
MOST_USERS: Final = 1024
ENOUGH_GAIN: Final = 1.05
"""The closed loop has twice the users again while that completes at least so much more."""

WARM_SECONDS: Final = 3.0
USERS_SECONDS: Final = 10.0
"""So long a closed loop runs, after it has warmed up, to tell whether more users complete more."""

CEILING_SECONDS: Final = 40.0
"""So long it then runs with the users that completed the most. Answers differ in length: what 10 s complete differs by
a tenth from run to run where 20 answers a second are completed, what 40 s complete by a twentieth."""

RUN_SECONDS: Final = 20.0
LEAST_REQUESTS: Final = 200
LONGEST_RUN_SECONDS: Final = 60.0
"""Each rate runs for RUN_SECONDS, longer at low rates, so that 1 % of the requests is at least one."""

PAUSE_SECONDS: Final = 1.0
"""Between two runs, so that what one leaves behind does not fall to the next."""


class NoCapacity(Exception):
    """Nothing was in time at any rate; the message says what came instead."""


async def calibrate(
    target: Target, shape: Shape, workers: Workers, *, seed: int = 1, say: Callable[[str], None] = lambda _: None
) -> float:
    """C of a target, in requests per second.

    Args:
        say: told of each run, a line each.

    Raises:
        NoCapacity: the target answers nothing in time.
        WorkerFailed: it does not answer at all.
    """
    ceiling = await _ceiling(target, shape, workers, seed, say)
    search = CapacitySearch(ceiling)
    while not search.is_done:
        await asyncio.sleep(PAUSE_SECONDS)
        rate = search.next_rate
        seconds = min(LONGEST_RUN_SECONDS, max(RUN_SECONDS, LEAST_REQUESTS / rate))
        load = baseline(shape, rate, seconds)
        ledger = await run(Plan(load=load, seed=seed + search.run_count), target, workers=workers)
        columns = columns_of(ledger.records)
        share = float(columns.of(Outcome.IN_TIME).mean()) if len(columns) else 1.0
        say(f"{rate:.1f} requests/s for {seconds:.0f} s: {share:.1%} in time")
        search.observe(rate, share)
    if search.capacity == 0:
        raise NoCapacity(f"even at {search.next_rate:.2f} requests/s less than 99 % meet their deadline")
    return search.capacity


async def _ceiling(target: Target, shape: Shape, workers: Workers, seed: int, say: Callable[[str], None]) -> float:
    """What a closed loop with enough users completes per second."""

    async def rate_of(users: int, seconds: float) -> float:
        rate = await _closed_rate(target, shape, workers, seed, users, seconds)
        say(f"a closed loop of {users} users completes {rate:.1f} requests/s in {seconds:.0f} s")
        return rate

    users = enough = FIRST_USERS
    best = await rate_of(users, USERS_SECONDS)
    while users < MOST_USERS:
        users *= 2
        rate = await rate_of(users, USERS_SECONDS)
        if rate < ENOUGH_GAIN * best:
            break
        enough, best = users, rate
    return await rate_of(enough, CEILING_SECONDS)


async def _closed_rate(
    target: Target, shape: Shape, workers: Workers, seed: int, users: int, measured_seconds: float
) -> float:
    seconds = WARM_SECONDS + measured_seconds
    flow = Flow(
        name="closed",
        arrivals=Closed(users),
        duration_seconds=seconds,
        prompt_tokens=shape.prompt_tokens,
        answer_tokens=shape.answer_tokens,
        deadline_seconds=shape.deadline_seconds,
    )
    ledger = await run(Plan(load=Load(name="closed", flows=(flow,)), seed=seed), target, workers=workers)
    columns = columns_of(ledger.records)
    whole = columns.of(Outcome.IN_TIME) & (columns.ended >= WARM_SECONDS) & (columns.ended < seconds)
    if not whole.any():
        failures = sorted({record.last.what for record in ledger.records if record.last is not None})
        raise NoCapacity(f"no answer was in time; {'; '.join(failures[:3]) or 'nothing came'}")
    return float(whole.sum()) / measured_seconds
