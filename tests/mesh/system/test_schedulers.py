"""Two schedulers that share nothing, on a real mesh: both decide, each finds what waits with the other, one may die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest

from tidegate.cli import probes
from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc, scheduler_pb2

NAMES = ("scheduler", "scheduler-1")
WAITING = 6


@pytest.fixture(scope="module")
def mesh(start_module_mesh: Callable[..., Any]) -> Any:
    return start_module_mesh("--engine", "llm_sim", "--schedulers", "2", "--max-sequences", "2")


@pytest.fixture
async def stub(mesh: Any) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    async with open_channel(mesh.ingress) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


async def snapshots(mesh: Any) -> list[scheduler_pb2.Snapshot]:
    return [await probes.snapshot(mesh.address(name), 5) for name in NAMES]


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await is_so():
            await asyncio.sleep(0.05)


async def answer(stub: Any, number: int, max_tokens: int) -> list[pb.GenerateEvent]:
    request = pb.GenerateRequest(
        request_id=f"my-{number}", text=f"Story {number}", max_tokens=max_tokens, ignore_eos=True
    )
    return [event async for event in stub.Generate(request, timeout=60)]


async def test_both_decide_and_status_shows_them_as_one(mesh: Any, stub: Any) -> None:
    before = [each.totals.dispatched for each in await snapshots(mesh)]
    answers = await asyncio.gather(*(answer(stub, number, 4) for number in range(40)))
    assert all(events[-1].finished.reason == pb.FINISH_REASON_LENGTH for events in answers)
    after = [each.totals.dispatched for each in await snapshots(mesh)]
    assert all(count > least for count, least in zip(after, before, strict=True))
    assert sum(after) == sum(before) + 40
    status = mesh.run("status", "-o", "json")
    assert status.returncode == 0, status.stdout
    assert f'"dispatched": {sum(after)}' in status.stdout


async def test_what_waits_is_found_whoever_is_asked(mesh: Any, stub: Any) -> None:
    blockers = [stub.Generate(pb.GenerateRequest(text="x", max_tokens=4000, ignore_eos=True)) for _ in range(2)]
    for blocker in blockers:
        assert (await blocker.read()).HasField("started")
    waiting = [asyncio.create_task(answer(stub, number, 2)) for number in range(WAITING)]

    async def all_wait() -> bool:
        lanes = [lane for each in await snapshots(mesh) for lane in each.lanes]
        return sum(lane.waiting_request_count for lane in lanes) == WAITING

    await until(all_wait)
    counts = [sum(lane.waiting_request_count for lane in each.lanes) for each in await snapshots(mesh)]
    assert min(counts) > 0
    async with httpx.AsyncClient(base_url=mesh.url, timeout=30) as http:
        for number in range(WAITING):
            for _ in range(4):
                status = await http.get(f"/v1/queue/my-{number}")
                assert (status.status_code, status.json()["status"]) == (200, "waiting"), status.text
        told = asyncio.create_task(place_and_text(http))
        await until(lambda: is_found(http, "told"))
        for blocker in blockers:
            blocker.cancel()
        place, text = await told
        assert place.startswith(": queued position=")
        assert text.startswith("data: ")
    assert all(events[-1].HasField("finished") for events in await asyncio.gather(*waiting))


async def place_and_text(http: httpx.AsyncClient) -> tuple[str, str]:
    """The first place that a stream tells, and the first event of its answer."""
    body = {"max_tokens": 4, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"x-queue-status": "stream", "x-client-request-id": "told"}
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        lines = [line async for line in response.aiter_lines() if line]
    return lines[0], next(line for line in lines if line.startswith("data: "))


async def is_found(http: httpx.AsyncClient, name: str) -> bool:
    return (await http.get(f"/v1/queue/{name}")).status_code == 200


async def test_nothing_fails_when_one_is_killed(mesh: Any, stub: Any) -> None:
    answers = [asyncio.create_task(answer(stub, number, 30)) for number in range(20)]
    await asyncio.sleep(0.2)
    for name in NAMES:
        pid = mesh.record(name)["pid"]
        os.kill(pid, signal.SIGKILL)
        answers += [asyncio.create_task(answer(stub, number, 4)) for number in range(20)]

        async def is_back(name: str = name, pid: int = pid) -> bool:
            record = mesh.record(name)
            return record["pid"] != pid and record["state"] == "ready"

        await until(is_back)
        answers += [asyncio.create_task(answer(stub, number, 4)) for number in range(20)]
    for events in await asyncio.gather(*answers):
        assert events[-1].finished.reason == pb.FINISH_REASON_LENGTH

    async def credits_are_whole() -> bool:
        try:
            found = await snapshots(mesh)
        except grpc.aio.AioRpcError:
            return False
        return sum(replica.credit_count for each in found for replica in each.replicas) == 2

    await until(credits_are_whole)
