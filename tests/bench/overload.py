"""Measures what the mesh does under a flood, each figure beside its bound: `make bench SCENARIO=overload`.

Two replicas of the simulated engine run in the real Triton behind the real Envoy, so the engine is the bottleneck and
answers can be checked byte for byte. C is the highest open-loop rate at which 99 % of the requests meet their
deadline; goodput is what was complete, right and in time. Nothing is told to the mesh about the engine.
Exit status 1 if a row does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from overload_cpu import cpu_bound
from overload_eta import told_waits
from overload_peers import PEERS, peers
from overload_rows import admitted_ttft, cost_shares, recovery_seconds, seconds_to_rate
from overload_streams import live_streams, many_waiting
from replica_metrics import GENERATED, engine_attempts, families, total
from running_mesh import NO_BUCKET
from steadiness import steadiness
from table import Table

from tidegate.bench.arrivals import Closed, Poisson, Square
from tidegate.bench.calibrate import calibrate
from tidegate.bench.columns import columns_of
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Ledger, Outcome, Record
from tidegate.bench.lengths import ConstantLength, LogNormalLength
from tidegate.bench.own_mesh import OwnMesh
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.scenarios import Shape
from tidegate.bench.statistics import percentile
from tidegate.bench.summary import fairness, summary
from tidegate.bench.workers import Workers
from tidegate.cli import probes
from tidegate.scheduler.observations import OUTPUT_TOKEN_COST
from tidegate.v1 import scheduler_pb2

REPLICAS: Final = 2
TENANTS: Final = (*(f"tenant-{number}" for number in range(10)), "one", "two", "four", "default")
SETTINGS: Final = {"TIDEGATE_SCHEDULER_TENANT_WEIGHTS": '{"two": 2, "four": 4}', **NO_BUCKET}

STORM_ROUNDS: Final = 2
"""So often realtime is measured alone and beside a flood of batch, in turn."""

PARTS: Final = (
    "goodput", "storm", "fairness", "floor", "square", "bursts", "eta", "retries", "schedulers", "drift", "cpu",
    "streams", "waiting", "peers",
)  # fmt: skip

DRIFT_REQUESTS: Final = 100_000
"""So many in floods of 60 s; fewer in shorter ones."""

DRIFT_ENGINE: Final = {
    "TIDEGATE_ENGINE_BASE_STEP_SECONDS": "0.005",
    "TIDEGATE_ENGINE_SECONDS_PER_SEQUENCE": "0",
    "TIDEGATE_ENGINE_SECONDS_PER_PREFILL_TOKEN": "0",
    "TIDEGATE_ENGINE_MAX_SEQUENCES": "4",
}
DRIFT_USERS: Final = 24
"""Three times the slots: what is refused has no credit to lose, so all are taken, and two of three wait."""

DRIFT_LEAVE_SHARE: Final = 0.5
DRIFT_LEAVE_WITHIN_SECONDS: Final = 0.25
"""About the time of an answer, so that most who mean to leave do: in the queue, before a token, after some."""

DRIFT_LEFT_PERCENT: Final = 33.0

ETA_DEADLINE_SECONDS: Final = 60.0
"""With which batch requests may wait for some 25 s, longer than the queue becomes."""

SHAPE: Final = Shape(answer_tokens=LogNormalLength(median=96, sigma=0.6, high=256, low=8))
"""Long enough that at ten times of C the engine is what there is too little of, not the two cores that the mesh and the
load generator share."""


@dataclass
class Bench:
    """What all parts use."""

    mesh: OwnMesh
    workers: Workers
    table: Table
    seconds: float
    shape: Shape = SHAPE
    capacity: float = 0.0

    def flow(self, name: str, times: float, **fields: object) -> Flow:
        """Poisson traffic at so many times of C."""
        values = {
            "arrivals": Poisson(times * self.capacity),
            "duration_seconds": self.seconds,
            "prompt_tokens": self.shape.prompt_tokens,
            "answer_tokens": self.shape.answer_tokens,
            "deadline_seconds": self.shape.deadline_seconds,
        }
        return Flow(name=name, **{**values, **fields})  # type: ignore[arg-type]

    async def run(self, name: str, *flows: Flow, seed: int = 1) -> Ledger:
        """Runs flows together."""
        print(f"  {name}", flush=True)
        ledger = await run(Plan(load=Load(name=name, flows=flows), seed=seed), self.mesh.target(), workers=self.workers)
        for warning in summary(ledger).warnings:
            print(f"    note: {warning}", flush=True)
        if await self.until_idle() == math.inf:
            self.table.at_most(f"{name}: left of it", 1, 0, "loads", stuck(await self.snapshot()))
        return ledger

    async def snapshot(self) -> scheduler_pb2.Snapshot:
        """The schedulers now, as one."""
        return await probes.snapshot_of_all(self.mesh.state.scheduler_addresses, 5)

    async def until_idle(self, seconds: float = 30.0) -> float:
        """Waits until nothing is left of a load; returns how long that took, infinite if it did not come."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() - began < seconds:
            if not stuck(await self.snapshot()):
                return loop.time() - began
            await asyncio.sleep(0.05)
        return math.inf


def stuck(snapshot: scheduler_pb2.Snapshot) -> str:
    """What is left of a load in a scheduler; empty for nothing."""
    waiting = sum(lane.waiting_request_count for lane in snapshot.lanes)
    in_flight = sum(replica.in_flight_count for replica in snapshot.replicas)
    running = sum(
        replica.load.running_request_count + replica.load.waiting_request_count for replica in snapshot.replicas
    )
    in_hand = sum(replica.credit_count for replica in snapshot.replicas)
    slots = sum(replica.load.slot_count for replica in snapshot.replicas)
    ready = sum(replica.connected and replica.load.ready for replica in snapshot.replicas)
    facts = {
        "waiting": waiting,
        "in flight": in_flight,
        "in the engines": running,
        "credits missing": max(0, slots - in_hand),
        "replicas missing": len(snapshot.replicas) - ready,
        "brownout": snapshot.brownout_step,
    }
    return ", ".join(f"{name} {count}" for name, count in facts.items() if count)


async def goodput(bench: Bench) -> None:
    """Floods of one class."""
    calm = columns_of((await bench.run("0.9 C", bench.flow("calm", 0.9))).records)
    calm_ttft = percentile(admitted_ttft(calm), 99)
    for times in (2, 5, 10):
        tail = bench.flow("after", 0.5, begin_seconds=bench.seconds, duration_seconds=8.0)
        before, read_before = total(await families(bench.mesh), GENERATED), await _refused_read(bench)
        ledger = await bench.run(f"{times} C", bench.flow("flood", times), tail)
        generated = total(await families(bench.mesh), GENERATED) - before
        columns, flood = columns_of(ledger.records), columns_of([r for r in ledger.records if r.flow == "flood"])
        in_time = float(flood.of(Outcome.IN_TIME).sum()) / bench.seconds
        how = f"{in_time:.1f} of {bench.capacity:.1f} requests/s; refused {flood.of(Outcome.REFUSED).mean():.0%}"
        bench.table.at_least(f"goodput at {times} C", 100 * in_time / bench.capacity, 95, "% of C", how, aim=98)
        served = int(columns.tokens[columns.of(Outcome.IN_TIME)].sum())
        wasted = 100 * (generated - served) / max(1, generated)
        how = f"of {generated} that the engines generated {served} came in answers that were in time"
        bench.table.at_most(f"wasted tokens at {times} C", wasted, 2, "%", how, aim=0.5)
        if times == 10:
            admitted = admitted_ttft(flood)
            ttft = percentile(admitted, 99)
            late = len(admitted) - int(flood.of(Outcome.IN_TIME).sum())
            how = f"{1000 * ttft:.0f} ms against {1000 * calm_ttft:.0f} ms at 0.9 C; {late} of {len(admitted)} late"
            bench.table.at_most("P99 TTFT of what was admitted at 10 C", ttft / calm_ttft, 1.5, "x", how, aim=1.2)
            refusal = 1000 * percentile(flood.refusal_seconds, 99)
            how = f"p50 {1000 * percentile(flood.refusal_seconds, 50):.1f}"
            bench.table.at_most("refusal, P99", refusal, 25, "ms", how, aim=5)
            read, refused = await _refused_read(bench) - read_before, int(columns.of(Outcome.REFUSED).sum())
            how = f"{read} of {refused}; the others by their headers, here or in Envoy"
            bench.table.at_most("refusals whose body was read", 100 * read / max(1, refused), 50, "%", how)
            untyped = int((flood.of(Outcome.REFUSED) & (flood.reason == "")).sum()) + int(
                flood.of(Outcome.FAILED).sum()
            )
            bench.table.at_most("refusals without a reason, and failures", untyped, 0, "requests", f"of {len(flood)}")
            wrong = int(flood.of(Outcome.WRONG_TEXT).sum())
            checked = sum(worker.checked_answers for worker in ledger.workers)
            bench.table.at_most("answers with wrong text", wrong, 0, "answers", f"of {checked} compared byte for byte")
            back = recovery_seconds(columns, bench.seconds, usual=calm_ttft)
            how = "0.5 C afterwards: TTFT within the P99 of 0.9 C, and it stays so"
            bench.table.at_most("after the load: back to normal", back, 2, "s", how, aim=0.5)


async def _refused_read(bench: Bench) -> int:
    """How many the scheduler refused so far whose body it had read."""
    totals = (await bench.snapshot()).totals
    return sum(totals.refused.values()) - totals.refused_unread


async def storm(bench: Bench) -> None:
    """Realtime beside a flood of batch and alone, in turn: of one run of some 400 requests a P99 is the fourth."""
    realtime = bench.flow("realtime", 0.3, service_class="realtime", tenants={"one": 1.0})
    batch = bench.flow("batch", 12.0, service_class="batch", tenants={"two": 1.0})
    records: dict[str, list[Record]] = {"alone": [], "realtime": [], "batch": []}
    for seed in range(1, STORM_ROUNDS + 1):
        records["alone"] += (await bench.run("realtime alone", realtime, seed=seed)).records
        for record in (await bench.run("realtime in a storm", realtime, batch, seed=seed)).records:
            records[record.flow].append(record)
    alone, beside, others = (columns_of(records[flow]) for flow in ("alone", "realtime", "batch"))
    before, after = (percentile(columns.ttft, 99) for columns in (alone, beside))
    served = float(others.of(Outcome.IN_TIME).sum()) / STORM_ROUNDS / bench.seconds / bench.capacity
    how = (
        f"{1000 * after:.0f} ms against {1000 * before:.0f} ms alone, {len(beside)} requests; 12 C of batch, of which"
        f" {served:.2f} C was in time"
    )
    bench.table.at_most("realtime P99 TTFT during a flood of batch", after / before, 1.5, "x", how, aim=1.2)
    share = 100 * float(beside.of(Outcome.IN_TIME).mean())
    bench.table.at_least("realtime in time during it", share, 99.9, "%", f"of {len(beside)}")


async def fair(bench: Bench) -> None:
    """Tenants against each other."""
    quiet = {f"tenant-{number}": 1.0 for number in range(1, 10)}
    ledger = await bench.run(
        "ten tenants",
        bench.flow("quiet", 2.7, tenants=quiet),
        bench.flow("loud", 3.0, tenants={"tenant-0": 1.0}, answer_tokens=ConstantLength(160)),
    )
    columns = columns_of(ledger.records)
    prompts = np.array([record.prompt_tokens for record in ledger.records])
    columns.tokens[:] = np.where(columns.of(Outcome.IN_TIME), prompts + OUTPUT_TOKEN_COST * columns.tokens, 0)
    index = fairness(columns, bench.seconds)
    first = f"without the first 10 s, {index[0]:.3f}" if len(index) > 1 else "of all of it, too short to leave out 10 s"
    index = index[1:] or index
    how = f"{first}; mean {np.mean(index):.3f}; nine ask for 0.3 C each, one 3 C, longer answers; output counts twice"
    bench.table.at_least("Jain's index of tokens per 10 s, lowest", min(index), 0.95, "", how, aim=0.99)
    flows = [bench.flow(name, 1.5, tenants={name: 1.0}) for name in ("one", "two", "four")]
    shares = cost_shares(
        columns_of((await bench.run("weights 1:2:4", *flows)).records), bench.seconds / 6, bench.seconds
    )
    off = max(abs(100 * (shares[name] - weight / 7)) for name, weight in (("one", 1), ("two", 2), ("four", 4)))
    how = ", ".join(f"{name} {100 * share:.1f} %" for name, share in sorted(shares.items()))
    bench.table.at_most("weights 1:2:4: largest difference of shares", off, 3, "points", how, aim=1)


async def floor(bench: Bench) -> None:
    """The lower lanes under a flood of the highest."""
    ledger = await bench.run(
        "realtime flood over the rest",
        bench.flow("realtime", 3.0, service_class="realtime", tenants={"one": 1.0}),
        bench.flow("standard", 2.0, service_class="standard", tenants={"four": 1.0}),
        bench.flow("batch", 0.5, service_class="batch", tenants={"two": 1.0}, deadline_seconds=4 * bench.seconds),
    )
    columns = columns_of(ledger.records)
    tokens = columns.tokens * (columns.ended < bench.seconds)
    how = "within a tenth of its floor, which is of expected cost, prompts too; counted is what came of answers"
    for service_class, floor_percent in (("standard", 10), ("batch", 2)):
        share = 100 * tokens[columns.service_class == service_class].sum() / max(1, tokens.sum())
        row = f"{service_class}'s share of tokens under 3 C of realtime, 2 C of standard"
        bench.table.at_least(row, share, 0.9 * floor_percent, "%", how)


async def square(bench: Bench) -> None:
    """A load that comes and goes ten times a second."""
    wave = Square(rate=10 * bench.capacity, high_seconds=0.1, low_seconds=0.1)
    columns = columns_of((await bench.run("square wave", bench.flow("square", 10, arrivals=wave))).records)
    share = 100 * float(columns.of(Outcome.IN_TIME).sum()) / bench.seconds / bench.capacity
    bench.table.at_least("square wave 10 C, 100 ms on and off: goodput", share, 90, "% of C")


async def bursts(bench: Bench) -> None:
    """Many short floods, each with a seed of its own; after each nothing may be left."""
    left: list[str] = []
    count = 100
    for seed in range(count):
        flow = bench.flow("burst", 10.0, duration_seconds=0.4, answer_tokens=ConstantLength(12), leave_share=0.2)
        load = Load(name="burst", flows=(flow,))
        await run(Plan(load=load, seed=seed), bench.mesh.target(), workers=bench.workers)
        if await bench.until_idle(15.0) == math.inf:
            left.append(stuck(await bench.snapshot()))
    bench.table.at_most(
        "bursts of which something was left", len(left), 0, "bursts", f"of {count}; {'; '.join(left[:3])}"
    )


async def eta(bench: Bench) -> None:
    """A queue that grows as long as the load lasts, of requests that may wait for a place in it."""
    flow = bench.flow(
        "waiting",
        1.0,
        service_class="batch",
        tenants=dict.fromkeys(("tenant-0", "tenant-1", "tenant-2"), 1.0),
        deadline_seconds=ETA_DEADLINE_SECONDS,
    )
    await told_waits(bench.table, bench.mesh, bench.workers, flow, 0.3 * bench.capacity)
    await bench.until_idle()


async def retries(bench: Bench) -> None:
    """An outage of all replicas, with clients that try three times more at once."""
    outage_begins, outage_seconds = 10.0, 30.0
    pids = [pid for name, pid in bench.mesh.pids().items() if name.startswith("model-")]

    async def outage() -> None:
        await asyncio.sleep(outage_begins)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(outage_seconds)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    before = engine_attempts(await families(bench.mesh))
    stopping = asyncio.create_task(outage())
    flow = bench.flow("naive", 0.8, retries="naive", duration_seconds=outage_begins + outage_seconds + 20)
    ledger = await bench.run("outage of 30 s, naive retries", flow)
    await stopping
    at_the_engine = engine_attempts(await families(bench.mesh)) - before
    columns = columns_of(ledger.records)
    came = len(columns) * (1 - outage_seconds / flow.duration_seconds)
    attempts = sum(len(record.attempts) for record in ledger.records)
    how = f"{at_the_engine}, as replicas count; {came:.0f} requests outside the outage; clients tried {attempts} times"
    bench.table.at_most("attempts at the engine in a retry storm", at_the_engine / came, 1.1, "x", how)
    back = seconds_to_rate(columns, outage_begins + outage_seconds, 0.9)
    bench.table.at_most("recovered after the outage", back, 5, "s", "until 90 % of a second's requests are in time")


async def schedulers(bench: Bench) -> None:
    """Floods on two schedulers that share nothing, and one of the two is killed; then on the only one. A scheduler that
    was killed is started again by the supervisor."""

    async def kill(pid: int) -> None:
        await asyncio.sleep(bench.seconds / 2)
        os.kill(pid, signal.SIGKILL)

    async def flood(name: str, mesh: OwnMesh, killed: str, begin: float) -> None:
        killing = asyncio.create_task(kill(mesh.pid(killed)))
        ledger = await dataclasses.replace(bench, mesh=mesh).run(f"5 C, {name}", bench.flow("flood", 5.0))
        await killing
        columns = columns_of(ledger.records)
        in_time = columns.of(Outcome.IN_TIME)
        for what, of in (
            # By when they were asked for: answers take their time, and the first half would lack that of its last ones.
            ("before", columns.planned < bench.seconds / 2),
            ("after", columns.planned >= bench.seconds / 2),
        ):
            share = 100 * float((in_time & of).sum()) / (bench.seconds / 2) / bench.capacity
            bench.table.at_least(f"goodput at 5 C, {name}, {what}", share, begin, "% of C")
        failed = int(columns.of(Outcome.FAILED).sum())
        wrong = int(columns.of(Outcome.WRONG_TEXT).sum())
        how = str(summary(ledger).failures)[:200]
        bench.table.at_most(f"the same, {name}: failed or wrong", failed + wrong, 0, "requests", how)

    arguments = ["--schedulers", "2"]
    async with OwnMesh(
        replicas=REPLICAS, engine="llm_sim", tenants=TENANTS, settings=SETTINGS, arguments=arguments
    ) as two:
        await flood("one of two schedulers killed", two, "scheduler-1", 95)
    await flood("the only scheduler killed", bench.mesh, "scheduler", 85)
    await asyncio.sleep(5.0)


async def drift(table: Table, workers: Workers, seconds: float) -> None:
    """Clients that leave at random moments: in the queue, before the first token, and in the middle of an answer."""
    settings = NO_BUCKET | DRIFT_ENGINE
    async with OwnMesh(replicas=REPLICAS, engine="llm_sim", tenants=TENANTS, settings=settings) as mesh:
        bench = Bench(mesh, workers, table, seconds)
        users = bench.flow(
            "leaving",
            0.0,
            arrivals=Closed(DRIFT_USERS),
            leave_share=DRIFT_LEAVE_SHARE,
            leave_within_seconds=DRIFT_LEAVE_WITHIN_SECONDS,
            prompt_tokens=ConstantLength(16),
            answer_tokens=ConstantLength(8),
            deadline_seconds=10.0,
        )
        wanted, count, begun, gone = round(DRIFT_REQUESTS * seconds / 60), 0, 0, 0
        while count < wanted:
            ledger = await bench.run(f"a third leaves, {count} of {wanted}", users, seed=count)
            columns = columns_of(ledger.records)
            count += len(columns)
            begun += int((columns.tokens > 0).sum())
            gone += int(columns.of(Outcome.LEFT).sum())
        left = stuck(await bench.snapshot())
    how = f"after {count} requests, of which {begun} began; {left}"
    table.at_most("credits that drifted", float(bool(left)), 0, "", how)
    table.at_least("the same: left before their end", 100 * gone / count, DRIFT_LEFT_PERCENT, "%", f"{gone} requests")


MEASURES: Final[dict[str, Callable[[Bench], Awaitable[None]]]] = {
    "goodput": goodput,
    "storm": storm,
    "fairness": fair,
    "floor": floor,
    "square": square,
    "bursts": bursts,
    "eta": eta,
    "retries": retries,
    "schedulers": schedulers,
}


async def measure(arguments: argparse.Namespace) -> int:
    """Runs the parts."""
    table = Table("The mesh under overload, two replicas of the simulated engine (llm_sim, h200-70b)")
    wanted = arguments.only or PARTS
    capacity = arguments.capacity
    table.note(f"Before, {steadiness()}")
    async with Workers(1) as workers:
        if not capacity or any(part in MEASURES for part in wanted):
            async with OwnMesh(replicas=REPLICAS, engine="llm_sim", tenants=TENANTS, settings=SETTINGS) as mesh:
                bench = Bench(mesh, workers, table, arguments.seconds)
                capacity = bench.capacity = capacity or await calibrate(
                    mesh.target(), bench.shape, workers, say=lambda line: print(f"  {line}", flush=True)
                )
                print(f"  C is {capacity:.1f} requests/s", flush=True)
                for part in PARTS:
                    if part in wanted and part in MEASURES:
                        await MEASURES[part](bench)
        if "drift" in wanted:
            await drift(table, workers, arguments.seconds)
        if "cpu" in wanted:
            await cpu_bound(table, workers, arguments.seconds)
        if "streams" in wanted:
            await live_streams(table)
        if "waiting" in wanted:
            await many_waiting(table)
        if "peers" in wanted:
            await peers(table, workers, capacity, SHAPE, arguments.seconds, arguments.peers)
    table.note(f"Afterwards, {steadiness()}")
    return table.finish(arguments.json)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each flood lasts")
    parser.add_argument("--capacity", type=float, default=0.0, help="C in requests/s; else it is measured")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part alone; may be repeated")
    parser.add_argument(
        "--peers", type=Path, default=None, help=f"folder of an environment with {', '.join(PEERS)} (its bin/ is used)"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    sys.exit(asyncio.run(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
