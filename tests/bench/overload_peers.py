"""Public routers, and plain round robin, before the same replicas under the same load as Tidegate.

The routers come from an environment of their own (`pip install smg vllm-router`), so that nothing of them is needed
otherwise. Replicas are told to queue without a bound, as engines do by default; each router runs at its defaults,
and smg once more as told by hand what the engines hold.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from table import Table

from tidegate.bench.arrivals import Poisson
from tidegate.bench.columns import columns_of
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Outcome
from tidegate.bench.own_mesh import OwnMesh, stop_process
from tidegate.bench.plain_envoy import UNBOUNDED, PlainEnvoy
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.scenarios import Shape
from tidegate.bench.statistics import percentile
from tidegate.bench.targets import Target
from tidegate.bench.workers import Workers
from tidegate.cli.ports import free_ports
from tidegate.cli.state import Mesh

PEERS: Final = ("smg", "vllm-router")
TIMES: Final = (2, 5)
START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
SLOTS: Final = 64
"""Of the two engines together: what a person would have to tell a router by hand."""


async def peers(
    table: Table, workers: Workers, capacity: float, shape: Shape, seconds: float, environment: Path | None
) -> None:
    """Adds a row a router and load: none of them has a bound, they are here to compare with."""
    async with OwnMesh(replicas=2, engine="llm_sim", settings=UNBOUNDED) as mesh:
        addresses = [mesh.address(f"model-{index}") for index in range(2)]
        async with PlainEnvoy(addresses, mesh.home) as plain:
            state = mesh.state
            await _measure(table, workers, "round robin", plain.round_robin, state, capacity, shape, seconds)
            if environment is None:
                print("  no --peers: public routers are left out", flush=True)
                return
            for name, program, arguments in _routers(plain.replicas):
                async with _Router(environment / "bin" / program, arguments, mesh.home / f"{name}.log") as router:
                    await _measure(table, workers, name, router.address, state, capacity, shape, seconds)


def _routers(replicas: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    urls = [f"http://{address}" for address in replicas]
    bounded = ["--max-concurrent-requests", str(SLOTS), "--queue-size", str(SLOTS // 4)]
    return [
        ("vllm-router at its defaults", "vllm-router", ["--worker-urls", *urls]),
        ("smg at its defaults", "smg", ["launch", "--worker-urls", *urls]),
        (f"smg told that the engines hold {SLOTS}", "smg", ["launch", "--worker-urls", *urls, *bounded]),
    ]


async def _measure(
    table: Table, workers: Workers, name: str, address: str, mesh: Mesh, capacity: float, shape: Shape, seconds: float
) -> None:
    target = Target(
        name=name,
        address=address,
        protocol="http",
        model=mesh.model_name,
        engine="llm_sim",
        model_path=mesh.model_path,
    )
    for times in TIMES:
        print(f"  {name}, {times} C", flush=True)
        flow = Flow(
            name="flood",
            arrivals=Poisson(times * capacity),
            duration_seconds=seconds,
            prompt_tokens=shape.prompt_tokens,
            answer_tokens=shape.answer_tokens,
            deadline_seconds=shape.deadline_seconds,
        )
        ledger = await run(Plan(load=Load(name=name, flows=(flow,)), seed=1), target, workers=workers)
        columns = columns_of(ledger.records)
        share = 100 * float(columns.of(Outcome.IN_TIME).sum()) / seconds / capacity
        ttft = percentile(columns.ttft, 99)
        how = f"P99 TTFT {ttft:.1f} s, refused {columns.of(Outcome.REFUSED).mean():.0%}; no bound, to compare with"
        table.at_least(f"goodput at {times} C, {name}", share, 0, "% of C", how)
        await asyncio.sleep(2.0)


class _Router:
    """Runs a router's program on a port of its own."""

    def __init__(self, program: Path, arguments: list[str], log: Path) -> None:
        port, metrics_port = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self._command = [str(program), *arguments, "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--prometheus-port", str(metrics_port)]
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
