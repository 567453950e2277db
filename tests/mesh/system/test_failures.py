"""Every process may die in the middle of the work: what was accepted is finished, and what died comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest

from tidegate.client import AsyncClient
from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

pytestmark = pytest.mark.timeout(240)
REPLICAS = ("model-0", "model-1")


@pytest.fixture(scope="module")
def mesh(start_module_mesh: Callable[..., Any]) -> Any:
    """Two replicas, to be killed in turn."""
    return start_module_mesh("--replicas", "2", "--threads", "1")


@pytest.fixture
async def stub(mesh: Any) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    async with open_channel(mesh.ingress) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    await until(lambda: is_whole(mesh), 60)


def request(seed: int, max_tokens: int, *, prompt_tokens: int = 24, **fields: Any) -> pb.GenerateRequest:
    """A prompt that no other seed has; sampled without a seed, so never answered from the cache."""
    token_ids = [1000 + (seed * 7919 + place * 104729) % 40000 for place in range(prompt_tokens)]
    fields.setdefault("sampling", pb.SamplingParameters(temperature=1.0))
    return pb.GenerateRequest(tokens=pb.TokenIds(token_ids=token_ids), max_tokens=max_tokens, ignore_eos=True, **fields)


def greedy(seed: int, max_tokens: int, **fields: Any) -> pb.GenerateRequest:
    return request(seed, max_tokens, sampling=pb.SamplingParameters(temperature=0), **fields)


class Stream:
    """One answer: its tokens as they come; ends in an exception unless it ends as it should."""

    def __init__(self, events: AsyncIterator[pb.GenerateEvent]) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.done = asyncio.ensure_future(self._read(events))

    async def _read(self, events: AsyncIterator[pb.GenerateEvent]) -> Stream:
        finished = None
        async for event in events:
            self.token_ids.extend(event.delta.token_ids)
            self.text += event.delta.text
            finished = event.finished if event.HasField("finished") else None
        assert finished is not None, "the stream ended silently"
        assert finished.reason == pb.FINISH_REASON_LENGTH, finished.error
        assert finished.usage.completion_token_count == len(self.token_ids)
        return self


async def until(is_true: Callable[[], Awaitable[bool]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await is_true():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        await asyncio.sleep(0.05)


async def snapshot(mesh: Any) -> scheduler_pb2.Snapshot:
    async with grpc.aio.insecure_channel(mesh.address("scheduler")) as channel:
        watch = scheduler_pb2_grpc.SchedulerStub(channel).Watch(scheduler_pb2.WatchRequest(once=True), timeout=5)
        return await anext(aiter(watch))


async def is_whole(mesh: Any) -> bool:
    """Whether everything runs and the scheduler reaches all of it."""
    if any(each["state"] != "ready" for each in mesh.state()["processes"]):
        return False
    try:
        seen = await snapshot(mesh)
    except grpc.aio.AioRpcError:
        return False
    replicas = [each for each in seen.replicas if each.connected and each.load.ready]
    return len(replicas) == len(REPLICAS) and all(each.reachable for each in seen.dependencies)


async def in_flight(mesh: Any, name: str) -> int:
    seen = await snapshot(mesh)
    return sum(each.in_flight_count for each in seen.replicas if each.load.replica == mesh.address(name))


async def busiest_replica(mesh: Any) -> str:
    busy = {name: await in_flight(mesh, name) for name in REPLICAS}
    assert max(busy.values()) > 0
    return max(busy, key=lambda name: busy[name])


async def resumed(mesh: Any, name: str) -> float:
    async with httpx.AsyncClient() as http:
        page = (await http.get(f"http://{mesh.address(f'{name}-metrics')}/metrics")).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("tidegate_resumes_total"))


def kill(mesh: Any, name: str) -> Callable[[], Awaitable[bool]]:
    """kill -9; answers how to ask whether it was started again."""
    before = mesh.record(name)
    os.kill(before["pid"], signal.SIGKILL)

    async def is_back() -> bool:
        now = mesh.record(name)
        return now["restart_count"] == before["restart_count"] + 1 and now["state"] == "ready"

    return is_back


@pytest.mark.parametrize("name", ["scheduler", "preprocess", "cache"])
async def test_no_request_fails_when_a_service_is_killed(mesh: Any, stub: Any, name: str) -> None:
    stop = asyncio.Event()
    answered = 0

    async def client() -> None:
        nonlocal answered
        while not stop.is_set():
            sampling = None if answered % 3 else pb.SamplingParameters(temperature=0)  # a third may be cached
            asked = request(answered % 40, 4, sampling=sampling or pb.SamplingParameters(temperature=1))
            await Stream(stub.Generate(asked, timeout=60)).done
            answered += 1

    long = [Stream(stub.Generate(request(900 + number, 40), timeout=120)) for number in range(2)]
    clients = [asyncio.ensure_future(client()) for _ in range(4)]

    async def have_answered(count: int) -> bool:
        for each in clients:
            if each.done():
                each.result()
        return answered >= count

    try:
        await until(lambda: have_answered(5), 60)
        is_back = kill(mesh, name)
        at_kill = answered
        await until(is_back, 60)
        await until(lambda: have_answered(at_kill + 8), 60)
    finally:
        stop.set()
        results = await asyncio.gather(*clients, *(each.done for each in long), return_exceptions=True)
    assert [each for each in results if isinstance(each, BaseException)] == []
    await until(lambda: is_whole(mesh), 60)
    # And it does its work again: a known answer is found once more.
    known = greedy(700, 4)
    await Stream(stub.Generate(known, timeout=60)).done

    async def is_replayed() -> bool:
        events = [event async for event in stub.Generate(known, timeout=60)]
        return events[0].started.cached

    await until(is_replayed, 30)


async def test_streams_go_on_with_the_same_text_when_their_triton_is_killed(mesh: Any, stub: Any) -> None:
    # Log-probabilities make these other answers to the cache, so the second run is generated too.
    calm = [Stream(stub.Generate(greedy(800 + each, 32, logprobs=0), timeout=120)) for each in range(4)]
    await asyncio.gather(*(each.done for each in calm))
    stormy = [Stream(stub.Generate(greedy(800 + each, 32), timeout=120)) for each in range(4)]

    async def all_began() -> bool:
        return all(len(each.token_ids) >= 3 for each in stormy)

    await until(all_began, 60)
    busiest = await busiest_replica(mesh)
    moved_before = await resumed(mesh, busiest)
    is_back = kill(mesh, busiest.replace("model", "triton"))
    await asyncio.gather(*(each.done for each in stormy))
    assert [each.token_ids for each in stormy] == [each.token_ids for each in calm]
    assert [each.text for each in stormy] == [each.text for each in calm]
    assert await resumed(mesh, busiest) > moved_before
    await until(is_back, 90)


async def test_a_request_whose_model_service_is_killed_before_the_first_token_goes_to_another(
    mesh: Any, stub: Any
) -> None:
    streams = [Stream(stub.Generate(request(1000 + each, 3, prompt_tokens=1000), timeout=120)) for each in range(2)]

    async def all_are_placed() -> bool:
        return sum([await in_flight(mesh, name) for name in REPLICAS]) == len(streams)

    await until(all_are_placed, 20)
    busiest = await busiest_replica(mesh)
    is_back = kill(mesh, busiest)
    assert [each.token_ids for each in streams] == [[]] * len(streams), "the machine is too fast for this prompt"
    await asyncio.gather(*(each.done for each in streams))
    await until(is_back, 60)


async def test_the_client_library_resumes_when_a_model_service_is_killed_in_the_middle(mesh: Any, stub: Any) -> None:
    calm = [Stream(stub.Generate(greedy(1100 + each, 24, logprobs=0), timeout=120)) for each in range(3)]
    await asyncio.gather(*(each.done for each in calm))
    async with AsyncClient(mesh.ingress) as client:
        stormy = [Stream(client.generate(greedy(1100 + each, 24), timeout_seconds=120)) for each in range(3)]

        async def all_began() -> bool:
            return all(len(each.token_ids) >= 3 for each in stormy)

        await until(all_began, 60)
        is_back = kill(mesh, await busiest_replica(mesh))
        await asyncio.gather(*(each.done for each in stormy))
    assert [each.token_ids for each in stormy] == [each.token_ids for each in calm]
    await until(is_back, 60)


async def test_requests_are_served_while_the_scheduler_hangs(mesh: Any, stub: Any) -> None:
    process = mesh.record("scheduler")["pid"]
    running = Stream(stub.Generate(request(1200, 20), timeout=60))
    os.kill(process, signal.SIGSTOP)
    try:
        new = [Stream(stub.Generate(request(1201 + each, 3), timeout=60)) for each in range(4)]
        await asyncio.gather(running.done, *(each.done for each in new))
    finally:
        os.kill(process, signal.SIGCONT)
    await until(lambda: is_whole(mesh), 60)
    before = (await snapshot(mesh)).totals.dispatched

    async def dispatches_again() -> bool:
        await Stream(stub.Generate(request(1300, 1), timeout=60)).done
        return (await snapshot(mesh)).totals.dispatched > before

    await until(dispatches_again, 30)


def test_the_mesh_says_what_it_mended(mesh: Any) -> None:
    talk = mesh.talk.read_text()
    ended = [line.split()[4] for line in talk.splitlines() if "ended (killed by SIGKILL); starting it again" in line]
    kinds = sorted(name.partition("-")[0] for name in ended)
    assert kinds == ["cache", "model", "model", "preprocess", "scheduler", "triton"]
    answer = mesh.run("status", "-o", "json")
    view = json.loads(answer.stdout)
    assert (answer.returncode, view["errors"]) == (0, [])
    assert {each["name"]: each["restart_count"] for each in view["processes"] if each["restart_count"]} == {
        name: ended.count(name) for name in ended
    }
