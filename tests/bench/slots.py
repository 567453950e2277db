"""How long a slot stands empty between two requests while others wait, with and without credits ahead.

Clients in a closed loop ask for short answers, so that slots change hands often; one mesh each, the simulated engine
behind it. `make bench SCENARIO=slots`, with ARGS="--engine llm" for the real one.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tidegate.bench.own_mesh import OwnMesh

WARM_SECONDS: Final = 8.0
GAUGES: Final = ("tidegate_slots", "tidegate_slots_used", "tidegate_credits_ahead", "tidegate_credit_gap_seconds")


@dataclass
class Count:
    """What the clients saw."""

    answers: int = 0
    refusals: int = 0


async def main() -> None:
    """Measures each setting and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="llm_sim")
    parser.add_argument("--preset", default="h200-8b", help="of the simulated engine")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 4], help="credit_ahead_limit")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--clients", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    rows = [await measure(options, ahead) for ahead in options.ahead]
    for row in rows:
        print(" ".join(f"{name}={value:.4g}" for name, value in row.items()), flush=True)


async def measure(options: argparse.Namespace, ahead: int) -> dict[str, float]:
    """One mesh: rates and the means of the replica's gauges."""
    arguments = ["--max-sequences", str(options.slots)]
    if options.engine == "llm_sim":
        arguments += ["--sim-preset", options.preset]
    settings = {"TIDEGATE_MODEL_CREDIT_AHEAD_LIMIT": str(ahead)}
    async with OwnMesh(replicas=1, engine=options.engine, settings=settings, arguments=arguments) as mesh:
        count = Count()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://{mesh.address('ingress')}", timeout=120, limits=limits) as http:
            clients = [
                asyncio.create_task(ask(http, mesh, number, options, count)) for number in range(options.clients)
            ]
            await asyncio.sleep(WARM_SECONDS)
            begin, before = time.monotonic(), Count(count.answers, count.refusals)
            means = await gauges(f"http://{mesh.address('model-0-metrics')}/metrics", options.seconds)
            seconds = time.monotonic() - begin
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    rate = (count.answers - before.answers) / seconds
    cycle_seconds = options.slots / rate
    return {
        "limit": ahead,
        "answers_per_second": rate,
        "refusals": count.refusals - before.refusals,
        "slot_cycle_ms": cycle_seconds * 1e3,
        "credit_gap_ms": means["tidegate_credit_gap_seconds"] * 1e3,
        "ahead": means["tidegate_credits_ahead"],
        "used": means["tidegate_slots_used"],
    }


async def ask(http: httpx.AsyncClient, mesh: OwnMesh, number: int, options: Any, count: Count) -> None:
    """One client: an answer after the other, each to a prompt of its own."""
    turn = 0
    while True:
        turn += 1
        body = {
            "model": mesh.state.model_name,
            "prompt": f"client {number} asks for the {turn}th time",
            "max_tokens": options.tokens,
            "temperature": 1.0,
        }
        response = await http.post("/v1/completions", json=body)
        if response.status_code == 200:
            count.answers += 1
        else:
            count.refusals += 1
            await asyncio.sleep(0.1)


async def gauges(url: str, seconds: float) -> dict[str, float]:
    """The means of the replica's gauges over this time."""
    sums, looks, end = dict.fromkeys(GAUGES, 0.0), 0, time.monotonic() + seconds
    async with httpx.AsyncClient() as http:
        while time.monotonic() < end:
            for family in text_string_to_metric_families((await http.get(url)).text):
                if family.name in sums:
                    sums[family.name] += family.samples[0].value
            looks += 1
            await asyncio.sleep(0.5)
    return {name: value / looks for name, value in sums.items()}


if __name__ == "__main__":
    asyncio.run(main())
