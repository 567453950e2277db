"""Measures what the mesh promises on one machine, each figure beside its bound: `make bench SCENARIO=mesh`.

The whole real mesh runs (Envoy, Triton, the engine, the default model). Engine and mesh are measured in turn in
the same run, so that what is compared saw the same machine. Exit status 1 if a row does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
from running_mesh import RunningMesh, engine_tokens_per_second, process_cpu_seconds, resident_bytes
from table import Table

from tidegate.common.grpc_clients import open_channel
from tidegate.model.triton_client import EngineRequest, TritonClient
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

PARALLEL_REQUESTS: Final = 32
ANSWER_TOKENS: Final = 128
PROMPT_TOKENS: Final = 32
TTFT_PROMPT_TOKENS: Final = 4
FLOOD_REQUESTS: Final = 1000
FLOOD_CLASSES: Final = (pb.SERVICE_CLASS_BATCH, pb.SERVICE_CLASS_STANDARD, pb.SERVICE_CLASS_REALTIME)
KILL_STREAMS: Final = 16
PARTS: Final = ("throughput", "ttft", "cost", "cancel", "queue", "kills")
IDLE_SECONDS: Final = 10.0
SETTINGS: Final = {
    "TIDEGATE_SCHEDULER_STANDARD_FLOOR": "0",
    "TIDEGATE_SCHEDULER_BATCH_FLOOR": "0",
    "TIDEGATE_SCHEDULER_BROWNOUT_QUEUE_DELAY_SECONDS": "1000",
    "TIDEGATE_SCHEDULER_BROWNOUT_FIRST_TOKEN_SECONDS": "1000",
    "TIDEGATE_MODEL_CREDIT_AHEAD_LIMIT": "0",
}
"""A queue alone is measured here: without what lower lanes are owed meanwhile, without a brownout that refuses batch,
and with all that waits in the scheduler, none ahead at the engine. The overload benchmark has these as they are."""

CALL_TIMEOUT_SECONDS: Final = 300.0
"""The bound on every single request of the benchmark."""


@dataclass
class Answer:
    """What came back of one request, with times on this process's monotonic clock."""

    sent: float
    first_token: float = 0.0
    ended: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def complete(self) -> bool:
        """Whether it ended as it should."""
        return not self.error and self.ended > 0


def prompt(seed: int, token_count: int = PROMPT_TOKENS) -> pb.TokenIds:
    """A prompt of plain tokens, different for each seed so that nothing can be reused."""
    return pb.TokenIds(token_ids=[1000 + (seed * 7919 + place * 104729) % 40000 for place in range(token_count)])


def request(seed: int, max_tokens: int, **fields: object) -> pb.GenerateRequest:
    """A sampled request without a seed (so the cache never answers it) for exactly `max_tokens` tokens."""
    tokens = fields.pop("tokens", None) or prompt(seed)
    sampling = pb.SamplingParameters(temperature=1.0)
    return pb.GenerateRequest(
        tokens=tokens,
        max_tokens=max_tokens,
        sampling=sampling,
        ignore_eos=True,
        **fields,  # type: ignore[arg-type]
    )


class Load:
    """Sends requests through the ingress."""

    def __init__(self, address: str, connection_count: int = 4) -> None:
        self._channels = [open_channel(address) for _ in range(connection_count)]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._next = 0

    async def close(self) -> None:
        """Ends all connections."""
        for channel in self._channels:
            await channel.close()

    def call(self, generate: pb.GenerateRequest) -> grpc.aio.UnaryStreamCall:
        """One stream, not read yet."""
        self._next += 1
        return self._stubs[self._next % len(self._stubs)].Generate(generate, timeout=CALL_TIMEOUT_SECONDS)

    async def answer(self, generate: pb.GenerateRequest) -> Answer:
        """One request to its end."""
        answer = Answer(time.monotonic())
        try:
            async for event in self.call(generate):
                if event.HasField("delta"):
                    answer.first_token = answer.first_token or time.monotonic()
                    answer.token_ids.extend(event.delta.token_ids)
                    answer.text += event.delta.text
                elif event.HasField("finished") and event.finished.reason == pb.FINISH_REASON_ERROR:
                    answer.error = event.finished.error.message
        except grpc.aio.AioRpcError as error:
            answer.error = f"{error.code().name}: {error.details()}"
        answer.ended = time.monotonic()
        return answer

    async def answers(self, requests: list[pb.GenerateRequest]) -> list[Answer]:
        """All at once, each to its end."""
        return list(await asyncio.gather(*(self.answer(each) for each in requests)))


async def throughput(mesh: RunningMesh, load: Load, table: Table, rounds: int) -> None:
    """Tokens per second of many streams through the mesh against the engine in its own process."""
    ratios, figures = [], []
    for round_number in range(rounds):
        engine = await engine_tokens_per_second(mesh, PARALLEL_REQUESTS, ANSWER_TOKENS, PROMPT_TOKENS)
        requests = [request(round_number * 1000 + each, ANSWER_TOKENS) for each in range(PARALLEL_REQUESTS)]
        begin = time.monotonic()
        answers = await load.answers(requests)
        seconds = time.monotonic() - begin
        _must_all_complete(answers)
        through = sum(len(each.token_ids) for each in answers) / seconds
        ratios.append(through / engine)
        figures.append(f"{through:.0f}/{engine:.0f}")
    table.at_least(
        "tokens/s through the mesh against the engine alone",
        100 * statistics.median(ratios),
        90,
        "%",
        f"{PARALLEL_REQUESTS} requests at once, {ANSWER_TOKENS} tokens each, in turn; tokens/s {', '.join(figures)}",
    )


async def added_time_to_first_token(mesh: RunningMesh, load: Load, table: Table, pairs: int) -> None:
    """What the mesh adds before the first token at no load, against the Triton client alone.

    The prompts are short and each way goes first in turn: the engine's own time varies by more than the mesh adds.
    """
    client = TritonClient(mesh.triton_addresses[0])
    await client.start()
    await client.wait_ready(30)

    async def through_the_mesh(seed: int) -> float:
        answer = await load.answer(request(seed, 1, tokens=prompt(seed, TTFT_PROMPT_TOKENS)))
        _must_all_complete([answer])
        return answer.first_token - answer.sent

    async def straight(seed: int) -> float:
        begin, first = time.monotonic(), 0.0
        async for output in client.generate(_engine_request(seed)):
            if output.token_ids and not first:
                first = time.monotonic() - begin
        return first

    ways: tuple[Callable[[int], Awaitable[float]], ...] = (through_the_mesh, straight)
    times: dict[Callable[[int], Awaitable[float]], list[float]] = {way: [] for way in ways}
    try:
        for pair in range(pairs + 3):
            for way in ways if pair % 2 else reversed(ways):
                seconds = await way(50_000 + pair)
                if pair >= 3:
                    times[way].append(seconds)
                await asyncio.sleep(0.02)
    finally:
        await client.close()
    added = [one - other for one, other in zip(times[through_the_mesh], times[straight], strict=True)]
    middle, alone = (1000 * statistics.median(times[way]) for way in ways)
    table.at_most(
        "added time to first token, no load, p50",
        1000 * statistics.median(added),
        8,
        "ms",
        f"median of {pairs} pairs, {TTFT_PROMPT_TOKENS} prompt tokens; {middle:.1f} ms against {alone:.1f} ms",
    )


async def cost_on_the_token_path(mesh: RunningMesh, load: Load, table: Table) -> None:
    """CPU time of Envoy and the scheduler by request and by token, from two runs that differ in tokens alone."""
    count, many = 64, 65

    names = ("envoy", "scheduler", "triton-0")

    async def spent(max_tokens: int) -> dict[str, float]:
        before = {name: process_cpu_seconds(mesh.pid(name)) for name in names}
        begin = time.monotonic()
        _must_all_complete(await load.answers([request(70_000 + each, max_tokens) for each in range(count)]))
        elapsed = time.monotonic() - begin
        after = {name: process_cpu_seconds(mesh.pid(name)) for name in names}
        return {name: after[name] - before[name] - idle[name] * elapsed for name in names}

    idle = await _idle_cpu_share(mesh, names)
    short, long = await spent(1), await spent(many)
    # What cannot be told from the idle time may come out below zero.
    per_token = {name: max(0.0, long[name] - short[name]) / (count * (many - 1)) for name in names}
    how = f"{count} requests of {many} and of 1 token, the processes' idle CPU time taken off"
    table.at_most("CPU of the scheduler per token", 1e6 * per_token["scheduler"], 1, "µs", how)
    table.at_most(
        "CPU of Envoy per token, of what Triton spends on it",
        100 * per_token["envoy"] / per_token["triton-0"],
        2,
        "%",
        f"{how}; {1e6 * per_token['envoy']:.0f} µs of {1e6 * per_token['triton-0']:.0f} µs",
    )
    together = (short["envoy"] + short["scheduler"]) / count
    table.at_most("CPU of envoy + scheduler per request", 1e3 * together, 5, "ms", f"{count} requests of 1 token")


async def queue_of_a_thousand(mesh: RunningMesh, table: Table) -> None:
    """Many requests at once on one replica: all answered, in order of their lanes, memory flat.

    It happens twice: what allocators keep of the first time, the second must find enough.
    """
    await _flood(mesh, 81_000)
    before = await _settled_memory(mesh)
    answers = await _flood(mesh, 83_000)
    after = await _settled_memory(mesh)
    failed = [each.error for each in answers if not each.complete]
    how = f"{mesh.slot_count} slots; " + "; ".join(sorted(set(failed)))
    table.at_most("requests not answered of 1,000 at once", len(failed), 0, "requests", how)
    table.at_most(
        "answers out of the order of their lanes",
        _out_of_order(answers, mesh.slot_count),
        0,
        "requests",
        "first tokens that came before a more urgent lane's last, beyond the slots of the engine",
    )
    growth = {name: (after[name] - size) / 2**20 for name, size in before.items()}
    worst = max(growth, key=lambda name: growth[name])
    how = f"{worst}; its size {before[worst] / 2**20:.0f} MiB; after a second 1,000 against after the first"
    table.at_most("memory that grew, the process that grew most", growth[worst], 8, "MiB", how)


async def _flood(mesh: RunningMesh, seed: int) -> list[Answer]:
    """1,000 requests of all classes while others hold the slots."""
    load = Load(mesh.ingress, 8)
    blockers = [asyncio.create_task(load.answer(request(seed + each, 150))) for each in range(mesh.slot_count)]
    await asyncio.sleep(1.0)
    flood = [
        request(seed, 2, tokens=prompt(seed + each, 8), service_class=FLOOD_CLASSES[each % 3])
        for each in range(FLOOD_REQUESTS)
    ]
    answers = await load.answers(flood)
    await asyncio.gather(*blockers)
    await load.close()
    return answers


async def _settled_memory(mesh: RunningMesh) -> dict[str, int]:
    await asyncio.sleep(5.0)
    return {name: resident_bytes(pid) for name, pid in mesh.pids().items()}


async def cancel(mesh: RunningMesh, load: Load, table: Table) -> None:
    """How soon a client that leaves frees what it held."""
    client = TritonClient(mesh.triton_addresses[0])
    await client.start()
    await client.wait_ready(30)

    async def freed() -> bool:
        engine = await client.load()
        return engine.running == 0 and engine.waiting == 0

    async def taken() -> bool:
        return (await client.load()).running == 1

    try:
        long_prompt = prompt(1, 4000)
        cases = [("prefill", request(90_000, 64, tokens=long_prompt)), ("decode", request(90_001, 2000))]
        for name, generate in cases:
            times = []
            for each in range(5):
                await _until(freed, 20)
                call = load.call(generate)
                reader = asyncio.create_task(_read(call))
                await _until(taken, 20)
                # Somewhere in the middle, at another point of a step each time.
                await asyncio.sleep(0.2 + 0.037 * each)
                assert await taken(), f"{name}: nothing ran when the client left"
                begin = time.monotonic()
                call.cancel()
                await _until(freed, 20)
                times.append(time.monotonic() - begin)
                await reader
            table.at_most(
                f"client leaves in {name}: slot free after", 1000 * statistics.median(times), 100, "ms", "median of 5"
            )
        await _cancel_in_queue(mesh, load, table)
    finally:
        await client.close()


async def _cancel_in_queue(mesh: RunningMesh, load: Load, table: Table) -> None:
    blockers = [load.call(request(91_000 + each, 1500)) for each in range(mesh.slot_count * mesh.replica_count)]
    readers = [asyncio.create_task(_read(each)) for each in blockers]
    channel = open_channel(mesh.mesh_address)
    scheduler = scheduler_pb2_grpc.SchedulerStub(channel)

    async def waiting() -> int:
        async for snapshot in scheduler.Watch(scheduler_pb2.WatchRequest(once=True), timeout=5):
            return sum(lane.waiting_request_count for lane in snapshot.lanes)
        raise AssertionError("the scheduler sent no snapshot")

    async def one_waits() -> bool:
        return await waiting() == 1

    async def none_waits() -> bool:
        return await waiting() == 0

    times = []
    try:
        await asyncio.sleep(1.0)
        for each in range(5):
            call = load.call(request(92_000 + each, 4))
            reader = asyncio.create_task(_read(call))
            await _until(one_waits, 10)
            begin = time.monotonic()
            call.cancel()
            await _until(none_waits, 10)
            times.append(time.monotonic() - begin)
            await reader
    finally:
        for call in blockers:
            call.cancel()
        await asyncio.gather(*readers)
        await channel.close()
    table.at_most("client leaves in queue: place free after", 1000 * statistics.median(times), 100, "ms", "median of 5")


async def kills(mesh: RunningMesh, load: Load, table: Table) -> None:
    """kill -9 of each service under load: no request fails, and streams of a dead Triton go on elsewhere."""
    for name in ("scheduler", "preprocess", "cache"):
        failed, answered = await _under_load(load, lambda name=name: mesh.kill(name))
        table.at_most(f"requests that failed when {name} was killed", failed, 0, "requests", f"of {answered}")
        await mesh.wait_healthy(60)
    calm = await load.answers([_greedy(95_000 + each, logprobs=0) for each in range(KILL_STREAMS)])
    _must_all_complete(calm)
    running = asyncio.create_task(load.answers([_greedy(95_000 + each) for each in range(KILL_STREAMS)]))
    await asyncio.sleep(1.5)
    mesh.kill("triton-0")
    stormy = await running
    failed = [each.error for each in stormy if not each.complete]
    differing = sum(one.token_ids != other.token_ids for one, other in zip(calm, stormy, strict=True))
    table.at_most(
        "streams that failed when one Triton of two was killed", len(failed), 0, "streams", "; ".join(set(failed))
    )
    table.at_most(
        "streams whose greedy text differs after it", differing, 0, "streams", f"of {KILL_STREAMS}, 96 tokens each"
    )
    await mesh.wait_healthy(120)


async def _under_load(load: Load, disturb: Callable[[], None]) -> tuple[int, int]:
    """Keeps streams running, disturbs in the middle; how many failed, and of how many."""
    stop_at = time.monotonic() + 6.0
    answers: list[Answer] = []

    async def one(seed: int) -> None:
        while time.monotonic() < stop_at:
            answers.append(await load.answer(request(seed + len(answers), 16)))

    streams = [asyncio.create_task(one(96_000 + 1000 * each)) for each in range(KILL_STREAMS)]
    await asyncio.sleep(2.0)
    disturb()
    await asyncio.gather(*streams)
    failed = [each.error for each in answers if not each.complete]
    for message in sorted(set(failed)):
        print(f"    {message}")
    return len(failed), len(answers)


def _greedy(seed: int, logprobs: int | None = None) -> pb.GenerateRequest:
    # An answer with log-probabilities has another key, so the cache cannot answer the one by the other.
    sampling = pb.SamplingParameters(temperature=0.0)
    return pb.GenerateRequest(tokens=prompt(seed), max_tokens=96, sampling=sampling, ignore_eos=True, logprobs=logprobs)


def _engine_request(seed: int) -> EngineRequest:
    import numpy

    return EngineRequest(
        request_id=f"bench-{seed}",
        tokens=numpy.asarray(prompt(seed, TTFT_PROMPT_TOKENS).token_ids, dtype=numpy.int32),
        max_tokens=1,
        sampling=pb.SamplingParameters(temperature=1.0),
        ignore_eos=True,
    )


def _out_of_order(answers: list[Answer], slot_count: int) -> int:
    """How many answers began before one of a more urgent lane did, beyond one engine's worth of slots."""
    lanes = [sorted(each.first_token for each in answers[lane::3]) for lane in (2, 1, 0)]
    wrong = 0
    for urgent, later in itertools.pairwise(lanes):
        overtaking = sum(first < urgent[-1] for first in later)
        wrong += max(0, overtaking - slot_count)
    return wrong


async def _idle_cpu_share(mesh: RunningMesh, names: tuple[str, ...]) -> dict[str, float]:
    await asyncio.sleep(3.0)
    before = {name: process_cpu_seconds(mesh.pid(name)) for name in names}
    await asyncio.sleep(IDLE_SECONDS)
    return {name: (process_cpu_seconds(mesh.pid(name)) - before[name]) / IDLE_SECONDS for name in names}


async def _read(call: grpc.aio.UnaryStreamCall) -> None:
    try:
        async for _ in call:
            pass
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass


async def _until(true: Callable[[], Awaitable[bool]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await true():
        assert time.monotonic() < deadline, f"{true.__name__} did not become true in {seconds} s"
        await asyncio.sleep(0.002)


def _must_all_complete(answers: list[Answer]) -> None:
    failed = [each.error for each in answers if not each.complete]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0]}")


async def measure(arguments: argparse.Namespace) -> int:
    """Runs the rows, with one replica and then with two."""
    table = Table("The mesh on one machine, with SmolLM2-135M-Instruct in fp32")
    wanted = arguments.only or PARTS
    if set(wanted) - {"kills"}:
        async with RunningMesh(replicas=1, settings=SETTINGS) as mesh:
            load = Load(mesh.ingress)
            await load.answers([request(each, 8) for each in range(PARALLEL_REQUESTS)])
            if "throughput" in wanted:
                await throughput(mesh, load, table, arguments.rounds)
            if "ttft" in wanted:
                await added_time_to_first_token(mesh, load, table, 100)
            if "cost" in wanted:
                await cost_on_the_token_path(mesh, load, table)
            if "cancel" in wanted:
                await cancel(mesh, load, table)
            if "queue" in wanted:
                await queue_of_a_thousand(mesh, table)
            await load.close()
    if "kills" in wanted:
        async with RunningMesh(replicas=2) as mesh:
            load = Load(mesh.ingress)
            await load.answers([request(each, 8) for each in range(PARALLEL_REQUESTS)])
            await kills(mesh, load, table)
            await load.close()
    return table.finish(arguments.json)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often engine and mesh take turns")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part alone; may be repeated")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    sys.exit(asyncio.run(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
