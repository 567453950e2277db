"""Tidegate beside public routers and plain round robin, before the same engines, under the same load and protocol.

The routers come from an environment of their own (`pip install smg vllm-router`), so that nothing of them is needed
otherwise. First Tidegate runs, as it is by default; then the others, each before new replicas that queue without a
bound, as engines do by default. Each router runs at its defaults, and once more told by hand what the engines hold. All
get the same requests over HTTP, of clients that give up at their deadline, and begin when the replicas have nothing to
do.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import yaml
from table import Table

from tidegate.bench.arrivals import Poisson
from tidegate.bench.columns import columns_of
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Outcome
from tidegate.bench.lengths import ConstantLength, draw
from tidegate.bench.own_mesh import OwnMesh, stop_process
from tidegate.bench.plain_envoy import UNBOUNDED, PlainEnvoy
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.scenarios import Shape
from tidegate.bench.statistics import percentile
from tidegate.bench.summary import summary
from tidegate.bench.targets import Target
from tidegate.bench.workers import Workers
from tidegate.cli import probes
from tidegate.cli.ports import free_ports

PEERS: Final = ("smg", "vllm-router")
"""What the environment has to have."""

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
SETTLED_SECONDS: Final = 10.0
"""After so long a flood has filled engines and queues; goodput is of what ends from then on until its end."""

IDLE_SECONDS: Final = 60.0
"""Within which replicas end what clients have given up."""

SLOTS: Final = 64
"""Of the two engines together: what a person would have to tell a router by hand."""

QUEUE: Final = SLOTS // 4
"""Told by hand, too: about a quarter of an answer's time, which the deadline leaves room for."""

BOUNDS: Final = ("--max-concurrent-requests", str(SLOTS), "--queue-size", str(QUEUE))

SMG_CLASSES: Final = {
    name: {
        "reserved_floor": reserved,
        "reserved_per_slot": 0.0,
        "queue_size": QUEUE,
        "queue_timeout_secs": 10,
        "starvation_threshold_secs": 10,
        "can_preempt": reserved > 0,
    }
    for name, reserved in (("system", 0), ("interactive", SLOTS // 4), ("default", 0), ("bulk", 0))
}
"""For its priority scheduler, whose own reservations are more than the slots there are."""

TIDEGATE: Final = "Tidegate"
ROUND_ROBIN: Final = "round robin"

TENANTS: Final = tuple(f"tenant-{number}" for number in range(5))
CLASSES: Final = {"realtime": 0.3, "standard": 2.35, "batch": 2.35}
"""How often C is asked for by each class: together five times."""

EQUAL: Final = Shape(prompt_tokens=ConstantLength(128), answer_tokens=ConstantLength(96))

PROMPT_TOKEN_SECONDS: Final = 0.1275e-3
ANSWER_TOKEN_SECONDS: Final = 14.7e-3 / 32 + 0.178e-3
"""What a token takes of a full engine's time, by its preset (h200-70b): a step's base is that of 32 sequences."""


@dataclass(frozen=True)
class Contest:
    """One load that all have to bear.

    Attributes:
        capacity: C for its requests, a second.
        share_by_hand: of the best one told by hand, what Tidegate must reach.
        is_for_all: whether those at their defaults run, too; what they let wait is late at 2 C as it is at 10 C.
    """

    name: str
    flows: tuple[Flow, ...]
    capacity: float
    share_by_hand: float
    is_for_all: bool


@dataclass(frozen=True)
class Result:
    """What one made of a load: goodput once it was settled in per cent of C, seconds, and per cent of realtime requests
    in time."""

    goodput: float
    ttft: float
    refused: float
    realtime_share: float
    realtime_ttft: float

    @property
    def words(self) -> str:
        """All of it."""
        words = f"{self.goodput:.0f} % of C (P99 TTFT {self.ttft:.2f} s, refused {self.refused:.0%}"
        if not math.isnan(self.realtime_share):
            words += f"; realtime {self.realtime_share:.1f} % in time, P99 TTFT {self.realtime_ttft:.2f} s"
        return f"{words})"


Results = dict[str, Result]
"""Of one load, by who ran."""


@dataclass(frozen=True)
class Contender:
    """One to compare with.

    Attributes:
        command: the router's program, in its environment, and how it is started; empty: Envoy, by turns.
        is_by_hand: told what the engines hold.
        config: of a file that the router reads, by the option that names it.
        class_headers: what says a request's class, by class.
    """

    name: str
    command: tuple[str, ...] = ()
    is_by_hand: bool = False
    config: Mapping[str, object] = field(default_factory=dict)
    class_headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


CONTENDERS: Final = (
    Contender(ROUND_ROBIN),
    Contender("smg at its defaults", ("smg", "launch")),
    Contender("vllm-router at its defaults", ("vllm-router",)),
    # Their balancing that fits requests with nothing in common; both go by prefixes at their defaults. The bound of
    # vllm-router on requests at once is a bucket that fills by as many a second, if it is not told otherwise.
    Contender(
        f"smg told that the engines hold {SLOTS}",
        ("smg", "launch", *BOUNDS, "--policy", "least_load"),
        is_by_hand=True,
    ),
    Contender(
        "smg told that, and with its priority scheduler",
        (
            *("smg", "launch", *BOUNDS, "--policy", "least_load"),
            *("--priority-scheduler-enabled", "--priority-scheduler-default-max-class", "system"),
        ),
        is_by_hand=True,
        config={"--priority-scheduler-config": {"classes": SMG_CLASSES}},
        class_headers={
            "realtime": {"x-smg-priority": "interactive"},
            "standard": {"x-smg-priority": "default"},
            "batch": {"x-smg-priority": "bulk"},
        },
    ),
    Contender(
        f"vllm-router told that the engines hold {SLOTS}",
        ("vllm-router", *BOUNDS, "--policy", "power_of_two", "--rate-limit-tokens-per-second", "1"),
        is_by_hand=True,
    ),
)


async def peers(
    table: Table, workers: Workers, capacity: float, shape: Shape, seconds: float, environment: Path | None
) -> None:
    """Runs all of them, one after the other; a row for each that Tidegate must not be behind, a note with all figures.

    Args:
        capacity: C for requests of the shape, a second; that of equal requests is derived from what they cost.
    """
    contests = contests_of(capacity, shape, seconds)
    results: list[Results] = [{} for _ in contests]

    async def measure(mesh: OwnMesh, target: Target, *, runs_all: bool) -> None:
        for contest, of_all in zip(contests, results, strict=True):
            if contest.is_for_all or runs_all:
                of_all[target.name] = await _measure(contest, workers, target)
                await _until_idle(mesh)

    async with OwnMesh(replicas=2, engine="llm_sim", tenants=(*TENANTS, "default")) as mesh:
        await measure(mesh, mesh.target(name=TIDEGATE, protocol="http"), runs_all=True)
    for contender in CONTENDERS:
        if contender.command and environment is None:
            continue
        async with (
            OwnMesh(replicas=2, engine="llm_sim", settings=UNBOUNDED) as mesh,
            _before(mesh, contender, environment) as address,
        ):
            await measure(
                mesh,
                Target(
                    name=contender.name,
                    address=address,
                    protocol="http",
                    model=mesh.state.model_name,
                    class_headers=contender.class_headers,
                    engine=mesh.engine,
                    model_path=mesh.state.model_path,
                ),
                runs_all=contender.is_by_hand,
            )
    if environment is None:
        table.note(f"Without --peers {' and '.join(PEERS)} are left out: Tidegate stands beside round robin alone.")
    for contest, of_all in zip(contests, results, strict=True):
        add_rows(table, contest, of_all)


def contests_of(capacity: float, shape: Shape, seconds: float) -> list[Contest]:
    """Equal requests and mixed lengths at 2 C and 10 C, tenants and classes at 5 C.

    Floods of 30 s take some 15 minutes: three for each at its defaults, five for Tidegate and those told by hand.
    """
    equal = msgspec.structs.replace(EQUAL, deadline_seconds=shape.deadline_seconds)
    equal_capacity = capacity * mean_cost_seconds(shape) / mean_cost_seconds(equal)
    contests = []
    for times in (2, 10):
        flow = _flow("flood", times * equal_capacity, equal, seconds)
        contests.append(Contest(f"equal requests, {times} C", (flow,), equal_capacity, 0.95, times == 2))
        flow = _flow("flood", times * capacity, shape, seconds)
        contests.append(Contest(f"mixed lengths, {times} C", (flow,), capacity, 1.0, times == 2))
    tenants = dict.fromkeys(TENANTS, 1.0)
    flows = tuple(
        msgspec.structs.replace(_flow(name, times * capacity, shape, seconds), service_class=name, tenants=tenants)
        for name, times in CLASSES.items()
    )
    contests.append(Contest("tenants and classes, 5 C", flows, capacity, 1.0, True))
    return contests


def mean_cost_seconds(shape: Shape) -> float:
    """How much of a full engine's time a request takes, on average."""
    random = np.random.default_rng(1)
    prompts, answers = (draw(lengths, 100_000, random) for lengths in (shape.prompt_tokens, shape.answer_tokens))
    return float(PROMPT_TOKEN_SECONDS * prompts.mean() + ANSWER_TOKEN_SECONDS * answers.mean())


def add_rows(table: Table, contest: Contest, results: Results) -> None:
    """Tidegate's goodput, and realtime's share where there is one, against the best of each kind."""
    table.note(f"{contest.name}: " + "; ".join(f"{name} {result.words}" for name, result in results.items()))
    own = results[TIDEGATE]
    for who, is_by_hand, share in (("at its defaults", False, 1.0), ("told by hand", True, contest.share_by_hand)):
        names = [contender.name for contender in CONTENDERS if contender.is_by_hand == is_by_hand]
        others = {name: results[name] for name in names if name in results}
        if not others:
            continue
        best = max(others, key=lambda name: others[name].goodput)
        if not is_by_hand:
            quickest = min(others, key=lambda name: others[name].ttft)
            how = f"P99 of those that had one: {own.ttft:.2f} s; {quickest}: {others[quickest].ttft:.2f} s"
            ratio = own.ttft / max(1e-9, others[quickest].ttft)
            table.at_most(f"{contest.name}: TTFT against the best {who}", ratio, 1.0, "x", how)
        how = f"{own.goodput:.0f} % of C; {best}: {others[best].goodput:.0f} %"
        ratio = own.goodput / max(1e-9, others[best].goodput)
        table.at_least(f"{contest.name}: goodput against the best {who}", ratio, share, "x", how)
        if not math.isnan(own.realtime_share):
            best = max(others, key=lambda name: others[name].realtime_share)
            other = others[best]
            how = f"the bound is {best}'s; P99 TTFT {own.realtime_ttft:.2f} s, its {other.realtime_ttft:.2f} s"
            name = f"{contest.name}: realtime in time against the best {who}"
            table.at_least(name, own.realtime_share, other.realtime_share, "%", how)


def _flow(name: str, rate: float, shape: Shape, seconds: float) -> Flow:
    return Flow(
        name=name,
        arrivals=Poisson(rate),
        duration_seconds=seconds,
        prompt_tokens=shape.prompt_tokens,
        answer_tokens=shape.answer_tokens,
        deadline_seconds=shape.deadline_seconds,
    )


async def _measure(contest: Contest, workers: Workers, target: Target) -> Result:
    print(f"  {target.name}: {contest.name}", flush=True)
    plan = Plan(load=Load(name=contest.name, flows=contest.flows), seed=1)
    ledger = await run(plan, target, workers=workers)
    for warning in summary(ledger).warnings:
        print(f"    note: {warning}", flush=True)
    columns = columns_of(ledger.records)
    in_time, realtime = columns.of(Outcome.IN_TIME), columns.service_class == "realtime"
    # What waits without a bound is served after a flood, too: that is not what it has in a flood.
    settled = in_time & (columns.ended >= SETTLED_SECONDS) & (columns.ended < ledger.duration_seconds)
    result = Result(
        goodput=100 * float(settled.sum()) / (ledger.duration_seconds - SETTLED_SECONDS) / contest.capacity,
        ttft=percentile(columns.ttft, 99),
        refused=float(columns.of(Outcome.REFUSED).mean()),
        realtime_share=100 * float(in_time[realtime].mean()) if realtime.any() else math.nan,
        realtime_ttft=percentile(columns.ttft[realtime], 99),
    )
    print(f"    {result.words}", flush=True)
    return result


async def _until_idle(mesh: OwnMesh) -> None:
    """Until the replicas have nothing to do: what is left of one load must not be in the way of the next."""
    async with asyncio.timeout(IDLE_SECONDS):
        while True:
            replicas = (await probes.snapshot(mesh.address("scheduler"), 5)).replicas
            if not any(replica.load.running_request_count + replica.load.waiting_request_count for replica in replicas):
                return
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _before(mesh: OwnMesh, contender: Contender, environment: Path | None) -> AsyncIterator[str]:
    """Starts one before the mesh's replicas; its address."""
    async with PlainEnvoy([mesh.address(f"model-{index}") for index in range(2)], mesh.home) as plain:
        if not contender.command:
            yield plain.round_robin
            return
        assert environment is not None
        program, *arguments = contender.command
        for option, content in contender.config.items():
            file = mesh.home / "router.yaml"
            file.write_text(yaml.safe_dump(content), encoding="utf-8")
            arguments += [option, str(file)]
        urls = ["--worker-urls", *(f"http://{address}" for address in plain.replicas)]
        command = [str(environment / "bin" / program), *arguments, *urls]
        async with _Router(command, mesh.home / "router.log") as router:
            yield router.address


class _Router:
    """Runs a router's program on a port of its own."""

    def __init__(self, command: list[str], log: Path) -> None:
        port, metrics_port = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self._command = [*command, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> _Router:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        async with asyncio.timeout(START_SECONDS):
            while not await _is_healthy(self.address):
                assert self._process.returncode is None, self._log.read_text(errors="replace")[-2000:]
                await asyncio.sleep(0.2)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        await stop_process(self._process, signal.SIGTERM, STOP_SECONDS)


async def _is_healthy(address: str) -> bool:
    import aiohttp

    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
