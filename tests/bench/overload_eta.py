"""Whether the wait is right that a waiting request is told, as a client sees it that asks for it on its own stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc
import msgspec
import numpy as np
from mesh import prompt, request
from table import Table

from tidegate.bench.clients.answer import CLASS_HEADER
from tidegate.bench.flows import Flow, Load
from tidegate.bench.lengths import draw
from tidegate.bench.own_mesh import OwnMesh
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.statistics import percentile
from tidegate.bench.workers import Workers
from tidegate.common.grpc_clients import open_channel
from tidegate.common.headers import QUEUE_STATUS
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

LEAST_SECONDS: Final = 0.5
"""A shorter wait is over before it matters how long it was said to be."""

MOST_ERROR: Final = 30.0
"""In per cent of the wait, of every other request."""


@dataclass
class Told:
    """What one client was told first, and what came, in seconds from then; None for what did not come."""

    wait_seconds: float | None = None
    told_at: float = 0.0
    left_seconds: float | None = None
    """Until it left the queue: the first token came then, less what the replica took for it."""
    first_token_seconds: float | None = None
    error: str = ""


@dataclass
class Errors:
    """Of those that waited long enough, by how much the wait was off, in per cent of the wait that came."""

    waited: list[float] = field(default_factory=list)
    of_wait: list[float] = field(default_factory=list)
    late: int = 0
    """Waited longer than they were told."""
    of_first_token: list[float] = field(default_factory=list)


async def told_waits(table: Table, mesh: OwnMesh, workers: Workers, background: Flow, asking_per_second: float) -> None:
    """Adds a row for the error of the wait that clients are told.

    Args:
        background: most of a load for which requests wait; those that ask are of the same class, tenants and lengths.
        asking_per_second: so many more requests.
    """
    asking = asyncio.create_task(_ask(mesh, background, asking_per_second))
    # Its counts are not the server's, which has those that ask as well.
    target = msgspec.structs.replace(mesh.target(), scheduler_addresses=())
    await run(Plan(load=Load(name="waits", flows=(background,)), seed=1), target, workers=workers)
    told = await asking
    errors = errors_of(told)
    figure = percentile(errors.of_wait, 50)
    failed = sum(bool(one.error) for one in told)
    how = (
        f"P90 {percentile(errors.of_wait, 90):.0f} %; {errors.late} of {len(errors.waited)} waited longer than told;"
        f" waits of {LEAST_SECONDS} s or more, {percentile(errors.waited, 50):.1f} s (P50) and"
        f" {percentile(errors.waited, 99):.1f} s (P99); against the first token"
        f" {percentile(errors.of_first_token, 50):.0f} %; {failed} of {len(told)} refused or late"
    )
    table.at_most("error of the wait that is told first, P50", figure, MOST_ERROR, "% of the wait", how)


def errors_of(told: Sequence[Told]) -> Errors:
    """The errors of what was told."""
    errors = Errors()
    for one in told:
        if one.wait_seconds is None or one.left_seconds is None or one.first_token_seconds is None:
            continue
        if one.left_seconds < LEAST_SECONDS:
            continue
        errors.waited.append(one.left_seconds)
        errors.of_wait.append(100 * abs(one.wait_seconds - one.left_seconds) / one.left_seconds)
        errors.late += one.left_seconds > one.wait_seconds
        errors.of_first_token.append(100 * abs(one.wait_seconds - one.first_token_seconds) / one.first_token_seconds)
    return errors


async def _ask(mesh: OwnMesh, like: Flow, per_second: float) -> list[Told]:
    """Sends requests at random moments; what each was told."""
    random = np.random.default_rng(2)
    count = random.poisson(per_second * like.duration_seconds)
    moments = np.sort(random.uniform(0.0, like.duration_seconds, count))
    prompts, answers = draw(like.prompt_tokens, count, random), draw(like.answer_tokens, count, random)
    tenants = list(like.tenants)
    told = [Told() for _ in range(count)]
    async with open_channel(mesh.address("ingress")) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, moment in enumerate(moments):
                await asyncio.sleep(max(0.0, begin + moment - time.monotonic()))
                generate = request(
                    number,
                    int(answers[number]),
                    tokens=prompt(number, int(prompts[number])),
                    service_class=pb.ServiceClass.Value(f"SERVICE_CLASS_{like.service_class.upper()}"),
                )
                metadata = (
                    ("authorization", f"Bearer {mesh.api_keys[tenants[number % len(tenants)]]}"),
                    (CLASS_HEADER, like.service_class),
                    (QUEUE_STATUS, "stream"),
                )
                group.create_task(_follow(stub, generate, metadata, like.deadline_seconds, told[number]))
    return told


async def _follow(
    stub: inference_pb2_grpc.InferenceStub,
    generate: pb.GenerateRequest,
    metadata: tuple[tuple[str, str], ...],
    timeout_seconds: float,
    told: Told,
) -> None:
    """One request to its end."""
    first_token_at: float | None = None
    try:
        async for event in stub.Generate(generate, timeout=timeout_seconds, metadata=metadata):
            now = time.monotonic()
            if event.HasField("queued") and event.queued.HasField("expected_wait") and told.wait_seconds is None:
                told.wait_seconds, told.told_at = event.queued.expected_wait.ToMicroseconds() / 1e6, now
            elif event.HasField("delta") and first_token_at is None:
                first_token_at = now
            elif event.HasField("finished"):
                finished = event.finished
                told.error = finished.error.message
                if first_token_at is not None and told.wait_seconds is not None and not told.error:
                    told.first_token_seconds = first_token_at - told.told_at
                    on_replica = finished.time_to_first_token.ToMicroseconds() / 1e6
                    told.left_seconds = told.first_token_seconds - on_replica
    except grpc.aio.AioRpcError as error:
        told.error = f"{error.code().name}: {error.details() or ''}"
