"""What the scheduler cannot decide, Envoy refuses for it: at random, by class, and only where it is told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import grpc
import pytest
from tests.mesh.envoy.conftest import until
from tests.mesh.envoy.test_errors import check_grpc_error, check_openai_error, grpc_error

from tidegate.common.errors import Reason
from tidegate.common.limits_file import FILTER_NAME, Limit, write_limits
from tidegate.common.shed_file import NOTHING_REFUSED, write_shares
from tidegate.v1 import inference_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
TRIES = 40
CLOCK_STEP_SECONDS = 1e-6
"""What is written of Envoy's times is cut to whole microseconds."""


async def statuses(client, service_class: str | None = None) -> Counter[int]:
    fields = {} if service_class is None else {"x-service-class": service_class}
    answers = await asyncio.gather(*(client.post(CHAT, json={}, headers=fields) for _ in range(TRIES)))
    return Counter(answer.status_code for answer in answers)


@pytest.fixture
async def shed(mesh):
    """Says what is let through, and waits until Envoy has read it."""

    async def say(retry_seconds: int = 1, **shares: float) -> None:
        loaded = await mesh.stat("runtime.load_success")
        write_shares(mesh.settings.shed_path, NOTHING_REFUSED | shares, retry_seconds)

        async def is_known() -> bool:
            return await mesh.stat("runtime.load_success") > loaded

        await until(is_known)

    yield say
    await say()


@pytest.fixture
async def limit(mesh):
    """Says who is limited to how many requests a second, and waits until Envoy has read it."""
    reloads = f"extension_config_discovery.http_filter.{FILTER_NAME}.config_reload"

    said: tuple[Limit, ...] = ()

    async def say(*limits: Limit) -> None:
        nonlocal said
        if limits == said:
            return
        said = limits
        loaded = await mesh.stat(reloads)
        write_limits(mesh.settings.limits_path, limits)

        async def is_known() -> bool:
            return await mesh.stat(reloads) > loaded

        await until(is_known)

    yield say
    await say()


async def test_nothing_is_refused_at_the_start(mesh, client):
    assert await statuses(client) == {200: TRIES}


@pytest.mark.parametrize("service_class", ["realtime", "standard", "batch"])
async def test_a_class_of_which_nothing_is_let_through_is_refused_and_no_other(mesh, client, shed, service_class):
    await shed(**{service_class: 0.0})
    for other in ("realtime", "standard", "batch"):
        assert await statuses(client, other) == {503 if other == service_class else 200: TRIES}
    assert len(mesh.scheduler.seen) == 2 * TRIES


async def test_a_request_without_a_class_counts_as_standard(mesh, client, shed):
    await shed(standard=0.0)
    assert await statuses(client) == {503: TRIES}
    await shed(realtime=0.0, batch=0.0)
    assert await statuses(client) == {200: TRIES}


async def test_some_of_a_class_is_let_through(mesh, client, shed):
    await shed(standard=0.5)
    counts = await statuses(client)
    assert counts[200] > 0
    assert counts[503] > 0


async def test_who_is_refused_is_told_over_http_when_to_come_back(mesh, client, shed):
    await shed(standard=0.0)
    answers = [await client.post(CHAT, json={}) for _ in range(TRIES)]
    for answer in answers:
        check_openai_error(answer, Reason.SERVER_IS_OVERLOADED)
    assert {answer.headers["retry-after"] for answer in answers} <= {"1", "2", "3", "4"}
    assert len({answer.headers["retry-after"] for answer in answers}) > 1


@pytest.mark.parametrize(("seconds", "told"), [(12, {"12", "16", "24", "32", "48"}), (64, {"64"})])
async def test_when_to_come_back_is_what_the_scheduler_says(client, shed, seconds, told):
    await shed(standard=0.0, retry_seconds=seconds)
    answers = [await client.post(CHAT, json={}) for _ in range(TRIES)]
    for answer in answers:
        check_openai_error(answer, Reason.SERVER_IS_OVERLOADED)
    heard = {answer.headers["retry-after"] for answer in answers}
    assert heard <= told
    assert len(heard) >= len(told) / 2


async def test_a_refused_client_keeps_its_connection(mesh, client, shed):
    await shed(standard=0.0)
    before = await mesh.stat("http.ingress.downstream_cx_total")
    for _ in range(TRIES):
        answer = await client.post(CHAT, json={"prompt": "x" * 100_000})
        check_openai_error(answer, Reason.SERVER_IS_OVERLOADED)
        assert "connection" not in answer.headers
    assert await mesh.stat("http.ingress.downstream_cx_total") - before <= 1


async def test_who_is_refused_is_told_over_grpc_when_to_come_back(mesh, stub, shed):
    await shed(standard=0.0)
    error = await grpc_error(stub.Generate(inference_pb2.GenerateRequest(text="x")))
    metadata = check_grpc_error(error, Reason.SERVER_IS_OVERLOADED)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert int(metadata["grpc-retry-pushback-ms"]) in (1000, 2000, 3000, 4000)


async def test_what_does_not_ask_the_scheduler_is_never_refused(mesh, client, shed):
    await shed(realtime=0.0, standard=0.0, batch=0.0)
    assert (await client.get("/v1/models")).status_code == 200
    assert (await client.get("/health")).status_code == 200


async def test_a_tenant_gets_no_more_than_its_limit_and_the_others_all(mesh, client, limit):
    await limit(("default", "batch", 5), ("another", "standard", 5))
    counts = await statuses(client, "batch")
    # A bucket is full at first, and fills on while the requests come.
    assert 5 <= counts[200] < TRIES / 2
    assert counts[503] == TRIES - counts[200]
    for other in ("realtime", "standard", None):
        assert await statuses(client, other) == {200: TRIES}
    assert len(mesh.scheduler.seen) == 3 * TRIES + counts[200]


async def test_a_request_without_a_class_has_a_limit_of_its_own(mesh, client, limit):
    await limit(("default", "", 5))
    assert await statuses(client, "standard") == {200: TRIES}
    assert (await statuses(client))[503] > TRIES / 2


async def test_a_limit_is_lifted(mesh, client, limit):
    await limit(("default", "", 5))
    assert (await statuses(client))[503] > 0
    await limit()
    assert await statuses(client) == {200: TRIES}


async def test_who_is_limited_is_told_so_as_of_an_overload(mesh, client, stub, limit):
    await limit(("default", "", 1))
    answers = [answer for answer in [await client.post(CHAT, json={}) for _ in range(TRIES)] if not answer.is_success]
    for answer in answers:
        check_openai_error(answer, Reason.SERVER_IS_OVERLOADED)
    assert len({answer.headers["retry-after"] for answer in answers}) > 1
    error = await grpc_error(stub.Generate(inference_pb2.GenerateRequest(text="x")))
    metadata = check_grpc_error(error, Reason.SERVER_IS_OVERLOADED)
    assert int(metadata["grpc-retry-pushback-ms"]) in (1000, 2000, 3000, 4000)


async def test_what_does_not_ask_the_scheduler_has_no_limit(client, limit):
    await limit(("default", "", 1))
    assert {(await client.get("/v1/models")).status_code for _ in range(5)} == {200}


async def test_the_scheduler_learns_when_a_request_arrived_and_what_class_it_asks_for(mesh, client):
    await client.post(CHAT, json={}, headers={"x-service-class": "batch", "x-tidegate-arrived": "1.5"})
    await client.post(CHAT, json={})
    first, second = mesh.scheduler.seen
    assert float(first["x-tidegate-arrived"]) > 1_700_000_000
    assert first["x-tidegate-class"] == "batch"
    assert "x-tidegate-class" not in second


async def test_the_scheduler_learns_when_all_of_a_request_had_arrived(mesh, client):
    asked = "http.ingress.downstream_rq_total"
    asked_before = await mesh.stat(asked)
    sent_seconds = 0.0

    async def begun() -> bool:
        return await mesh.stat(asked) > asked_before

    async def in_two_parts():
        nonlocal sent_seconds
        yield b'{"prompt":'
        await until(begun)
        sent_seconds = time.time()
        yield b'"x"}'

    answer = await client.post(CHAT, content=in_two_parts(), headers={"content-type": "application/json"})
    assert answer.status_code == 200
    (seen,) = mesh.scheduler.seen
    assert float(seen["x-tidegate-arrived"]) < sent_seconds
    assert float(seen["x-tidegate-whole"]) > sent_seconds - CLOCK_STEP_SECONDS
