"""How many streams live at once, and how many requests wait at once, on meshes of their own.

The engines are made slow (a token every few seconds for all) rather than small, so that every stream is really open
and gets its tokens while the others get theirs.
"""

from __future__ import annotations

import asyncio
import re
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
LIVE_STREAMS_AIM: Final = 20_000
LIVE_TOKENS: Final = 72
BASE_STEP_SECONDS: Final = 0.5
FULL_STEP_SECONDS: Final = 5.0
"""Each stream gets a token so often when all are open; sooner before, or the mesh's first answer would take minutes."""

OPENED_PER_SECOND: Final = 120.0

WAITING_REQUESTS: Final = 20_000
WAITING_REQUESTS_AIM: Final = 100_000
WAITING_SLOTS: Final = 64
WAITING_TOKENS: Final = 4
"""With a second for each token 16 requests leave in a second, so that 20,000 can be waited for within the deadline."""

COME_PER_SECOND: Final = 300.0
"""More than can be looked at would be refused, and what is measured is how many can wait."""

LOOK_EVERY: Final = 100
LOOK_TRIES: Final = 5
"""A connection that is not there within a tenth of a second fails, and on a busy machine that is so now and then."""

MOST_SENT_SHARE: Final = 1.3
"""Of those that are to wait: some leave meanwhile."""

WAIT_SECONDS: Final = 3_600.0
RELEASE_SECONDS: Final = 330.0
"""Envoy's allocator gives back what was not needed for five minutes, and takes a few seconds for it."""

PROMPT_TOKENS: Final = 8
CONNECTIONS: Final = 16
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
    table.at_least("live streams at once", seen.most_alive, count, "streams", how, aim=LIVE_STREAMS_AIM)
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
    engine = {"TIDEGATE_ENGINE_BASE_STEP_SECONDS": "1", "TIDEGATE_ENGINE_MAX_SEQUENCES": str(WAITING_SLOTS)}
    # All of one class: of several, the last would be refused, since it could not be served in time behind the others.
    bound = {"TIDEGATE_SCHEDULER_STANDARD_REQUEST_LIMIT": str(count)}
    async with RunningMesh(replicas=1, engine="llm_sim", settings=QUIET | engine | bound) as mesh:
        start = await _memory(mesh, 0.0)
        await _wait_together(mesh, count)
        first = await _memory(mesh, RELEASE_SECONDS)
        most, refused, held = await _wait_together(mesh, count)
        after = await _memory(mesh, RELEASE_SECONDS)
        left = await _waiting(mesh)
    how = f"refused or failed {dict(refused)}" if refused else "deadline an hour away"
    table.at_least("requests waiting at once", most, count, "requests", how, aim=WAITING_REQUESTS_AIM)
    growth = {name: (after[name] - size) / 2**20 for name, size in first.items()}
    worst = max(growth, key=lambda name: growth[name])
    start_total, first_total, total, after_total = (
        sum(sizes.values()) / 2**20 for sizes in (start, first, held, after)
    )
    each = ", ".join(
        f"{name} {' '.join(f'{sizes.get(name, 0) / 2**20:.0f}' for sizes in (start, held, first, after))}"
        for name in after
    )
    table.note(f"MiB at the start, while they waited, and after the first and the second time: {each}")
    how = (
        f"{worst}, {after[worst] / 2**20:.0f} MiB; all processes: {start_total:.0f} MiB at the start, {total:.0f} "
        f"while they waited, {first_total:.0f} and {after_total:.0f} {RELEASE_SECONDS:.0f} s after they had left"
    )
    table.at_most("the same: memory that grew from the first time to the second", growth[worst], 16, "MiB", how)
    table.at_most("the same: still waiting after all have left", left, 0, "requests", "")


async def _wait_together(mesh: RunningMesh, count: int) -> tuple[int, Counter[str], dict[str, int]]:
    """The most that waited, what did not, and each process's memory meanwhile; all have left when it returns."""
    channels = [open_channel(mesh.ingress) for _ in range(CONNECTIONS)]
    stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
    ended: Counter[str] = Counter()

    async def wait(number: int) -> None:
        generate = _request(number, WAITING_TOKENS)
        try:
            async for _ in stubs[number % CONNECTIONS].Generate(generate, timeout=WAIT_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            words = re.sub(r"[\d.]+", "N", error.details() or "")
            ended[f"{error.code().name}: {words[:80]}"] += 1

    tasks, begin, most = [], time.monotonic(), 0
    for number in range(round(MOST_SENT_SHARE * count)):
        if number % LOOK_EVERY == 0:
            most = max(most, await _waiting(mesh))
            if most >= count:
                break
        tasks.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(max(0.0, begin + number / COME_PER_SECOND - time.monotonic()))
    held = {name: resident_bytes(pid) for name, pid in mesh.pids().items()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for channel in channels:
        await channel.close()
    return most, ended, held


async def _memory(mesh: RunningMesh, seconds: float) -> dict[str, int]:
    """Each process's own memory, so long after nothing waits any more."""
    for _ in range(60):
        if not await _waiting(mesh):
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(seconds)
    return {name: resident_bytes(pid) for name, pid in mesh.pids().items()}


async def _waiting(mesh: RunningMesh) -> int:
    for tries_left in reversed(range(LOOK_TRIES)):
        try:
            snapshot = await probes.snapshot(mesh.address("scheduler"), 30)
            break
        except grpc.aio.AioRpcError as error:
            if not tries_left or error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.5)
    return sum(lane.waiting_request_count for lane in snapshot.lanes)


def _request(number: int, max_tokens: int, **fields: object) -> pb.GenerateRequest:
    return request(number, max_tokens, tokens=prompt(number, PROMPT_TOKENS), **fields)
