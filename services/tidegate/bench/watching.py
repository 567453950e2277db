"""Watches the scheduler during a run, and reads the server's own counts before and after it."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
import grpc
import msgspec

from tidegate.bench.samples import Sample, from_snapshot
from tidegate.bench.targets import Target
from tidegate.cli import probes
from tidegate.common.grpc_clients import open_channel
from tidegate.common.snapshots import together
from tidegate.v1 import scheduler_pb2, scheduler_pb2_grpc

SAMPLE_SECONDS: Final = 0.25
"""Between two samples."""

READ_SECONDS: Final = 3.0
"""For one reading of the counts."""

SETTLE_SECONDS: Final = 5.0
"""After a run: the longest that the counts may take to stand still."""

SHED_COUNTERS: Final = re.compile(r"fault\.aborts_injected$|tenant_limits\.http_local_rate_limit\.enforced$")
"""The counters of what Envoy refuses for the scheduler."""

_REQUESTS: Final = re.compile(r'^tidegate_requests_total\{outcome="(\w*)",reason="(\w*)"\} (\S+)$', re.MULTILINE)


class ServerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What the server has counted since its start."""

    scheduler_id: str = ""
    """Another one after than before means that the counts began anew."""
    received: int = 0
    dispatched: int = 0
    replayed: int = 0
    passed_through: int = 0
    abandoned: int = 0
    refused: dict[str, int] = {}
    """By the scheduler, by reason."""
    model: dict[str, int] | None = None
    """By the model services together: outcome, or `refused/REASON`; None where they were not asked."""
    shed: int = 0
    """By Envoy itself, because the scheduler cannot decide about all that comes."""


def difference(before: ServerCounts, after: ServerCounts) -> ServerCounts:
    """What was counted between two readings."""
    model = None
    if before.model is not None and after.model is not None:
        model = {name: count - before.model.get(name, 0) for name, count in after.model.items()}
    return ServerCounts(
        scheduler_id=after.scheduler_id,
        received=after.received - before.received,
        dispatched=after.dispatched - before.dispatched,
        replayed=after.replayed - before.replayed,
        passed_through=after.passed_through - before.passed_through,
        abandoned=after.abandoned - before.abandoned,
        refused={reason: count - before.refused.get(reason, 0) for reason, count in after.refused.items()},
        model=model,
        shed=after.shed - before.shed,
    )


class Watcher:
    """Collects samples of the schedulers, as of one, while it is open as an asynchronous context.

    Args:
        now: seconds since the beginning of the run.
    """

    def __init__(self, scheduler_addresses: Sequence[str], now: Callable[[], float]) -> None:
        self._addresses = scheduler_addresses
        self._now = now
        self._newest: dict[str, scheduler_pb2.Snapshot] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.samples: list[Sample] = []

    async def __aenter__(self) -> Watcher:
        self._tasks = [asyncio.create_task(self._watch(address)) for address in self._addresses]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, address: str) -> None:
        request = scheduler_pb2.WatchRequest()
        request.interval.FromMilliseconds(int(SAMPLE_SECONDS * 1000))
        async with open_channel(address) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            while True:
                try:
                    async for snapshot in stub.Watch(request):
                        self._newest[address] = snapshot
                        # One sample of all, with the one that has been there for longest.
                        if address == next(iter(self._newest)):
                            self.samples.append(from_snapshot(together(list(self._newest.values())), self._now()))
                except grpc.aio.AioRpcError:
                    self._newest.pop(address, None)
                    # A scheduler that was killed comes back; what it did meanwhile is not in the picture.
                    await asyncio.sleep(SAMPLE_SECONDS)


async def read_counts(target: Target) -> ServerCounts | None:
    """The server's counts now; None where the schedulers are not known or one does not answer."""
    if not target.scheduler_addresses:
        return None
    try:
        async with asyncio.timeout(READ_SECONDS):
            snapshot = await probes.snapshot_of_all(target.scheduler_addresses, READ_SECONDS)
            model = await _model_counts(target.model_metrics_addresses)
            shed = await _shed_count(target.envoy_admin_address)
    except (TimeoutError, grpc.aio.AioRpcError, aiohttp.ClientError, OSError):
        return None
    totals = snapshot.totals
    return ServerCounts(
        scheduler_id=snapshot.scheduler_id,
        received=totals.received,
        dispatched=totals.dispatched,
        replayed=totals.replayed,
        passed_through=totals.passed_through,
        abandoned=totals.abandoned,
        refused=dict(totals.refused),
        model=model,
        shed=shed,
    )


async def settled_counts(target: Target) -> ServerCounts | None:
    """The counts once two readings in a row are the same, or after SETTLE_SECONDS."""
    before = await read_counts(target)
    for _ in range(int(SETTLE_SECONDS / SAMPLE_SECONDS)):
        await asyncio.sleep(SAMPLE_SECONDS)
        after = await read_counts(target)
        if after is not None and after == before:
            return after
        before = after or before
    return before


def model_counts(page: str) -> Counter[str]:
    """The requests of one model service by outcome, from its metrics page."""
    counts: Counter[str] = Counter()
    for outcome, reason, count in _REQUESTS.findall(page):
        counts[outcome] += int(float(count))
        if outcome == "refused":
            counts[f"refused/{reason}"] += int(float(count))
    return counts


async def _model_counts(addresses: tuple[str, ...]) -> dict[str, int] | None:
    if not addresses:
        return None
    counts: Counter[str] = Counter()
    async with aiohttp.ClientSession(trust_env=False) as session:
        for address in addresses:
            async with session.get(f"http://{address}/metrics") as response:
                counts.update(model_counts(await response.text()))
    return dict(counts)


async def _shed_count(admin_address: str) -> int:
    if not admin_address:
        return 0
    async with (
        aiohttp.ClientSession(trust_env=False) as session,
        session.get(f"http://{admin_address}/stats", params={"filter": SHED_COUNTERS.pattern}) as response,
    ):
        lines = (await response.text()).splitlines()
    counters = (line.partition(": ") for line in lines)
    return sum(int(value) for name, _, value in counters if SHED_COUNTERS.search(name))
