"""How many streams live at once, and how many requests wait at once, on meshes of their own.

The engines are made slow (a token every few seconds for all) rather than small, so that every stream is really open
and gets its tokens while the others get theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import grpc
from mesh import prompt, request
from running_mesh import NO_BUCKET, RunningMesh, resident_bytes
from table import Table

from tidegate.cli import probes
from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

LIVE_STREAMS: Final = 10_000
LIVE_TOKENS: Final = 72
BASE_STEP_SECONDS: Final = 0.5
FULL_STEP_SECONDS: Final = 5.0
"""Each stream gets a token so often when all are open; sooner before, or the mesh's first answer would take minutes."""

OPENED_PER_SECOND: Final = 120.0

WAITING_REQUESTS: Final = 20_000
WAIT_SECONDS: Final = 3_600.0
PROMPT_TOKENS: Final = 8
CONNECTIONS: Final = 16
CLASSES: Final = (pb.SERVICE_CLASS_REALTIME, pb.SERVICE_CLASS_STANDARD, pb.SERVICE_CLASS_BATCH)
QUIET: Final = {
    # What is measured is what the mesh holds, not what it would refuse.
    **NO_BUCKET,
    "TIDEGATE_SCHEDULER_BROWNOUT_QUEUE_DELAY_SECONDS": "3600",
    "TIDEGATE_SCHEDULER_BROWNOUT_FIRST_TOKEN_SECONDS": "3600",
    # As many wait as are asked for, not some of them at the engine.
    "TIDEGATE_MODEL_CREDIT_AHEAD_LIMIT": "0",
}


@dataclass
class Seen:
    """What came of the streams."""

    alive: int = 0
    most_alive: int = 0
    ended: Counter[str] = field(default_factory=Counter)


async def live_streams(table: Table, count: int = LIVE_STREAMS) -> None:
    """Opens so many streams and lets all of them get tokens."""
    engine = {
        "TIDEGATE_ENGINE_BASE_STEP_SECONDS": str(BASE_STEP_SECONDS),
        "TIDEGATE_ENGINE_SECONDS_PER_SEQUENCE": str((FULL_STEP_SECONDS - BASE_STEP_SECONDS) / (count / 2)),
        "TIDEGATE_ENGINE_SECONDS_PER_PREFILL_TOKEN": "0",
        "TIDEGATE_ENGINE_MAX_SEQUENCES": str(count),
        "TIDEGATE_ENGINE_STEP_TOKEN_BUDGET": str(16 * count),
    }
    async with RunningMesh(replicas=2, engine="llm_sim", settings=QUIET | engine) as mesh:
        channels = [open_channel(mesh.ingress) for _ in range(CONNECTIONS)]
        stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        seen = Seen()
        tasks = []
        begin = time.monotonic()
        for number in range(count):
            tasks.append(asyncio.create_task(_live(stubs[number % CONNECTIONS], number, seen)))
            await asyncio.sleep(max(0.0, begin + number / OPENED_PER_SECOND - time.monotonic()))
        await asyncio.gather(*tasks)
        for channel in channels:
            await channel.close()
    failed = {words: many for words, many in seen.ended.items() if words != "complete"}
    how = f"a token each {FULL_STEP_SECONDS:.0f} s, {LIVE_TOKENS} tokens; {failed or 'all complete'}"
    table.at_least("live streams at once", seen.most_alive, 0.99 * count, "streams", how)
    table.at_most("the same: streams that failed", sum(failed.values()), 0, "streams", f"of {count}")


async def _live(stub: inference_pb2_grpc.InferenceStub, number: int, seen: Seen) -> None:
    """One stream; it is alive from its first token to its last."""
    call = stub.Generate(_request(number, LIVE_TOKENS), timeout=600)
    is_alive = False
    words, tokens = "cut short", 0
    try:
        async for event in call:
            if event.HasField("delta"):
                tokens += len(event.delta.token_ids)
                if not is_alive:
                    is_alive = True
                    seen.alive += 1
                    seen.most_alive = max(seen.most_alive, seen.alive)
            elif event.HasField("finished"):
                error = event.finished.error.message if event.finished.HasField("error") else ""
                words = error or ("complete" if tokens == LIVE_TOKENS else f"{tokens} tokens")
    except grpc.aio.AioRpcError as error:
        words = f"{error.code().name}: {(error.details() or '')[:80]}"
    seen.alive -= is_alive
    seen.ended[words] += 1


async def many_waiting(table: Table, count: int = WAITING_REQUESTS) -> None:
    """Lets so many requests wait, twice, and looks at what the mesh's processes hold meanwhile and afterwards."""
    engine = {"TIDEGATE_ENGINE_BASE_STEP_SECONDS": "1", "TIDEGATE_ENGINE_MAX_SEQUENCES": "4"}
    async with RunningMesh(replicas=1, engine="llm_sim", settings=QUIET | engine) as mesh:
        await _wait_together(mesh, count)
        first = await _memory(mesh)
        most, refused, held = await _wait_together(mesh, count)
        after = await _memory(mesh)
        left = await _waiting(mesh)
    how = f"refused or failed {dict(refused)}" if refused else "three classes, deadline an hour away"
    table.at_least("requests waiting at once", most, count, "requests", how)
    growth = {name: (after[name] - size) / 2**20 for name, size in first.items()}
    worst = max(growth, key=lambda name: growth[name])
    total = sum(held.values()) / 2**20
    how = f"{worst}, {after[worst] / 2**20:.0f} MiB; all processes held {total:.0f} MiB while they waited"
    table.at_most("the same: memory that grew, the process that grew most", growth[worst], 16, "MiB", how)
    table.at_most("the same: still waiting after all have left", left, 0, "requests", "")


async def _wait_together(mesh: RunningMesh, count: int) -> tuple[int, Counter[str], dict[str, int]]:
    """The most that waited, what did not, and each process's memory meanwhile; all have left when it returns."""
    channels = [open_channel(mesh.ingress) for _ in range(CONNECTIONS)]
    stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
    ended: Counter[str] = Counter()

    async def wait(number: int) -> None:
        generate = _request(number, 200, service_class=CLASSES[number % len(CLASSES)])
        try:
            async for _ in stubs[number % CONNECTIONS].Generate(generate, timeout=WAIT_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            ended[f"{error.code().name}: {(error.details() or '')[:80]}"] += 1

    # The engine's slots are taken by as many more.
    tasks = [asyncio.create_task(wait(number)) for number in range(count + 8)]
    most, deadline = 0, time.monotonic() + 180
    while most < count and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        most = max(most, await _waiting(mesh))
    held = {name: resident_bytes(pid) for name, pid in mesh.pids().items()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for channel in channels:
        await channel.close()
    return most, ended, held


async def _memory(mesh: RunningMesh) -> dict[str, int]:
    """Each process's own memory once nothing waits any more."""
    for _ in range(60):
        if not await _waiting(mesh):
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(5.0)
    return {name: resident_bytes(pid) for name, pid in mesh.pids().items()}


async def _waiting(mesh: RunningMesh) -> int:
    snapshot = await probes.snapshot(mesh.address("scheduler"), 30)
    return sum(lane.waiting_request_count for lane in snapshot.lanes)


def _request(number: int, max_tokens: int, **fields: object) -> pb.GenerateRequest:
    return request(number, max_tokens, tokens=prompt(number, PROMPT_TOKENS), **fields)
