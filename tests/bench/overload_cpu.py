"""An engine that costs nothing, so that the mesh itself is what there is too little of."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from replica_metrics import FAIL_OPEN, families, total
from running_mesh import NO_BUCKET
from table import Table

from tidegate.bench.arrivals import Arrivals, Closed, Poisson
from tidegate.bench.calibrate import calibrate
from tidegate.bench.columns import columns_of
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Ledger, Outcome
from tidegate.bench.lengths import ConstantLength
from tidegate.bench.own_mesh import OwnMesh
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.scenarios import Shape
from tidegate.bench.statistics import percentile
from tidegate.bench.summary import summary
from tidegate.bench.targets import Target
from tidegate.bench.workers import Workers

BOUNDS: Final = {2: (80.0, 90.0), 5: (70.0, 80.0), 10: (60.0, 70.0)}
"""What is held at so many times of what the mesh can carry, in per cent of it, and what is aimed at."""

SHAPE: Final = Shape(prompt_tokens=ConstantLength(64), answer_tokens=ConstantLength(4), deadline_seconds=4.0)
SLOTS: Final = 2_048
"""Of each engine: more than can be under way, so that no slot is ever waited for."""

USERS: Final = 64
"""Of the closed loop that shows what is carried: more do not get more done."""

STRANGER: Final = "stranger"
SETTLE_SECONDS: Final = 3.0

COSTS_NOTHING: Final = {
    "TIDEGATE_ENGINE_BASE_STEP_SECONDS": "0.001",
    "TIDEGATE_ENGINE_SECONDS_PER_SEQUENCE": "0",
    "TIDEGATE_ENGINE_SECONDS_PER_PREFILL_TOKEN": "0",
    "TIDEGATE_ENGINE_MAX_SEQUENCES": str(SLOTS),
    "TIDEGATE_ENGINE_KV_BLOCK_COUNT": str(16 * SLOTS),
    "TIDEGATE_ENGINE_STEP_TOKEN_BUDGET": str(64 * SLOTS),
}


async def cpu_bound(table: Table, workers: Workers, seconds: float) -> None:
    """Floods of what the mesh can carry, with the load generator on the same cores.

    What it carries is measured for each flood, beside as many requests as the flood has too many, which Envoy refuses
    for their key: whoever asks so often needs a good part of the two cores to do so.
    """
    async with OwnMesh(replicas=1, engine="llm_sim", tenants=("default",), settings=NO_BUCKET | COSTS_NOTHING) as mesh:
        target = mesh.target()
        target = msgspec.structs.replace(target, api_keys={**target.api_keys, STRANGER: "no-such-key"})
        capacity = await calibrate(target, SHAPE, workers, say=lambda line: print(f"  {line}", flush=True))
        alone, _ = await _in_time("at its best, nothing else", target, workers, _flow("closed", Closed(USERS), seconds))
        best = max(capacity, alone)
        print(f"  the mesh carries {best:.0f} requests/s at its best, {capacity:.0f} in time as they come", flush=True)
        for times, (bound, aim) in BOUNDS.items():
            strangers = _flow("strangers", Poisson((times - 1) * capacity), seconds, STRANGER)
            closed = _flow("closed", Closed(USERS), seconds)
            carried, _ = await _in_time(
                f"{times} times, of which all but one at the door", target, workers, closed, strangers
            )
            flood = _flow("flood", Poisson(times * capacity), seconds)
            before = total(await families(mesh), FAIL_OPEN)
            in_time, ledger = await _in_time(f"{times} times", target, workers, flood)
            passed_by = total(await families(mesh), FAIL_OPEN) - before
            columns = columns_of(ledger.records)
            bad = int(columns.of(Outcome.FAILED).sum()) + int(columns.of(Outcome.WRONG_TEXT).sum())
            late = columns.of(Outcome.LATE) | columns.of(Outcome.DEADLINE_EXCEEDED)
            refusal_ms = 1000 * percentile(columns.refusal_seconds, 99)
            generator = sum(worker.cpu_seconds for worker in ledger.workers) / seconds
            how = (
                f"{in_time:.0f} of {carried:.0f} requests/s that it carries beside as many refused at the door;"
                f" {in_time / best:.0%} of the {best:.0f} that it carries at its best when nothing else comes; refused"
                f" {columns.of(Outcome.REFUSED).mean():.0%}, P99 {refusal_ms:.0f} ms; late {late.mean():.1%};"
                f" the generator used {generator:.0%} of a core"
            )
            table.at_least(f"CPU-bound: goodput at {times} times", 100 * in_time / carried, bound, "%", how, aim=aim)
            what = f"of {len(columns)}; {str(summary(ledger).failures)[:300]}" if bad else f"of {len(columns)}"
            table.at_most("the same: failed or wrong", bad, 0, "requests", what)
            table.at_most("the same: passed the scheduler by", passed_by, 0, "requests", "as the replica counts")


async def _in_time(name: str, target: Target, workers: Workers, *flows: Flow) -> tuple[float, Ledger]:
    """Runs flows together; how many requests of the first were in time, a second."""
    print(f"  {name}", flush=True)
    ledger = await run(Plan(load=Load(name=name, flows=flows), seed=1), target, workers=workers)
    for warning in summary(ledger).warnings:
        print(f"    note: {warning}", flush=True)
    await asyncio.sleep(SETTLE_SECONDS)
    columns = columns_of([record for record in ledger.records if record.flow == flows[0].name])
    return float(columns.of(Outcome.IN_TIME).sum()) / flows[0].duration_seconds, ledger


def _flow(name: str, arrivals: Arrivals, seconds: float, tenant: str = "default") -> Flow:
    return Flow(
        name=name,
        arrivals=arrivals,
        duration_seconds=seconds,
        tenants={tenant: 1.0},
        prompt_tokens=SHAPE.prompt_tokens,
        answer_tokens=SHAPE.answer_tokens,
        deadline_seconds=SHAPE.deadline_seconds,
    )
