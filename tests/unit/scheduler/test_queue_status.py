"""Places in the queue, as those who ask see them: a whole scheduler, spoken to as Envoy and as clients do."""

from __future__ import annotations

import asyncio
import contextlib
import json

import grpc
import pytest
from prometheus_client import REGISTRY

from tidegate.cli.endpoints import write_endpoints
from tidegate.common import headers
from tidegate.scheduler.bodies import client_request_id
from tidegate.v1 import inference_pb2, preprocess_pb2, scheduler_pb2

ACME = ((headers.TENANT, "acme"),)
OTHER = ((headers.TENANT, "other"),)
DISPATCHED, REFUSED, LEFT = (
    scheduler_pb2.QUEUE_STATE_DISPATCHED,
    scheduler_pb2.QUEUE_STATE_REFUSED,
    scheduler_pb2.QUEUE_STATE_LEFT,
)


def ask(world, name, metadata=ACME):
    return world.scheduler.GetQueueStatus(scheduler_pb2.GetQueueStatusRequest(request_id=name), metadata=metadata)


def watch(world, name, *, patience_seconds=5.0, metadata=ACME):
    request = scheduler_pb2.WatchQueueStatusRequest(request_id=name)
    request.interval.FromMilliseconds(100)
    request.patience.FromMilliseconds(round(patience_seconds * 1000))
    return world.scheduler.WatchQueueStatus(request, metadata=metadata)


async def rest(call):
    """All that still comes."""
    statuses = []
    async with asyncio.timeout(5):
        while (status := await call.read()) is not grpc.aio.EOF:
            statuses.append(status)
    return statuses


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code()


async def wait_in_line(world, *names, **fields):
    exchanges = []
    for count, name in enumerate(names, start=1):
        exchanges.append(world.exchange())
        await exchanges[-1].begin({headers.REQUEST_ID: name, headers.CLIENT_REQUEST_ID: f"my-{name}", **fields})
        await world.until(lambda snapshot, count=count: snapshot.lanes[1].waiting_request_count == count)
    return exchanges


@pytest.fixture
async def pair(start_world, tmp_path):
    """Two schedulers that know of each other; what waits, waits with the first."""
    file = tmp_path / "schedulers.yaml"
    write_endpoints(file, "scheduler", [])
    first, second = [await start_world(schedulers_file=str(file)) for _ in range(2)]
    write_endpoints(file, "scheduler", [("127.0.0.1", each.service.server.port) for each in (first, second)])
    return first, second


async def until_neighbours(world, name):
    """Until the scheduler knows of the other one, which has the request."""
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return await ask(world, name)
            await asyncio.sleep(0.02)


async def test_a_request_is_found_by_every_scheduler_and_shown_to_its_own_tenant_alone(pair):
    first, second = pair
    await wait_in_line(first, "a", "b", **dict(ACME))
    assert (await until_neighbours(second, "b")).position == 2
    assert (await ask(second, "my-b")).request_id == "b"
    page = await second.scheduler.QueueStatusPage(scheduler_pb2.GetQueueStatusRequest(request_id="my-a"), metadata=ACME)
    page = json.loads(page.data)
    assert (page["id"], page["request_id"], page["position"]) == ("my-a", "a", 1)
    assert (page["class"], page["status"]) == ("standard", "waiting")
    assert await code_of(ask(second, "a", OTHER)) is grpc.StatusCode.NOT_FOUND
    assert await code_of(ask(second, "c")) is grpc.StatusCode.NOT_FOUND


async def test_a_request_is_followed_wherever_it_comes_to_wait(pair):
    first, second = pair
    await wait_in_line(first, "known")
    await until_neighbours(second, "known")
    calls = [watch(world, "later") for world in pair]
    (exchange,) = [first.exchange()]
    await exchange.begin({headers.REQUEST_ID: "later", **dict(ACME)})
    for call in calls:
        assert (await call.read()).position == 2
    first.replica.grant("1", "2")
    for call in calls:
        assert (await rest(call))[-1].state == DISPATCHED
    assert first.service.queue_statuses.is_idle
    assert second.service.queue_statuses.is_idle


async def test_who_follows_nothing_is_told_so_after_the_patience_and_leaves_nothing_behind(pair):
    first, second = pair
    await wait_in_line(first, "known")
    await until_neighbours(second, "known")
    assert await code_of(watch(second, "nobody", patience_seconds=0.3).read()) is grpc.StatusCode.NOT_FOUND
    gone = watch(second, "nobody")
    await asyncio.sleep(0.1)
    gone.cancel()
    async with asyncio.timeout(5):
        while not all(world.service.queue_statuses.is_idle for world in pair):
            await asyncio.sleep(0.02)


async def test_a_scheduler_that_died_is_no_reason_not_to_answer(pair):
    first, second = pair
    await wait_in_line(first, "a")
    await until_neighbours(second, "a")
    await first.service.server.grpc.stop(0)
    assert await code_of(ask(second, "a")) is grpc.StatusCode.NOT_FOUND
    assert await code_of(watch(second, "a", patience_seconds=0.1).read()) is grpc.StatusCode.NOT_FOUND
    await wait_in_line(second, "b")
    assert (await ask(second, "b")).position == 1
    assert (await watch(second, "b").read()).position == 1


async def test_a_request_is_found_by_the_meshs_id_and_by_the_clients(world):
    await wait_in_line(world, "a", "b")
    for name in ("b", "my-b"):
        status = await ask(world, name)
        assert (status.request_id, status.position, status.state) == ("b", 2, scheduler_pb2.QUEUE_STATE_WAITING)


async def test_a_request_of_another_tenant_is_not_found(world):
    await wait_in_line(world, "a")
    assert await code_of(ask(world, "a", OTHER)) is grpc.StatusCode.NOT_FOUND
    assert await code_of(watch(world, "my-a", patience_seconds=0, metadata=OTHER).read()) is grpc.StatusCode.NOT_FOUND


async def test_of_two_tenants_with_one_name_each_sees_its_own(world):
    await wait_in_line(world, "a", **{headers.CLIENT_REQUEST_ID: "same"})
    exchange = world.exchange()
    await exchange.begin({headers.REQUEST_ID: "b", headers.CLIENT_REQUEST_ID: "same", headers.TENANT: "other"})
    await world.until(lambda snapshot: snapshot.lanes[1].waiting_request_count == 2)
    assert (await ask(world, "same")).request_id == "a"
    assert (await ask(world, "same", OTHER)).request_id == "b"


async def test_the_page_is_an_object_in_the_manner_of_openais(world):
    await wait_in_line(world, "a")
    request = scheduler_pb2.GetQueueStatusRequest(request_id="my-a")
    page = json.loads((await world.scheduler.QueueStatusPage(request, metadata=ACME)).data)
    assert page.pop("waited_ms") >= 0
    assert page == {
        "id": "my-a",
        "object": "queue.status",
        "request_id": "a",
        "class": "standard",
        "position": 1,
        "eta_ms": None,
        "status": "waiting",
    }


async def test_a_watch_may_begin_before_the_request_and_ends_as_it_is_dispatched(world):
    call = watch(world, "a")
    await asyncio.sleep(0.05)
    await wait_in_line(world, "a")
    assert (await call.read()).position == 1
    world.replica.grant("credit")
    states = [status.state for status in await rest(call)]
    assert states[-1] == DISPATCHED
    assert await code_of(ask(world, "a")) is grpc.StatusCode.NOT_FOUND


async def test_a_watch_says_how_its_request_was_refused(start_world):
    world = await start_world(standard_deadline_seconds=0.4)
    call = watch(world, "a")
    await wait_in_line(world, "a")
    last = (await rest(call))[-1]
    assert (last.state, last.reason, last.position) == (REFUSED, "DEADLINE_EXCEEDED", 0)


async def test_a_watch_says_that_the_client_left(world):
    call = watch(world, "a")
    (exchange,) = await wait_in_line(world, "a")
    assert (await call.read()).position == 1
    exchange.call.cancel()
    assert [status.state for status in await rest(call)][-1] == LEFT


async def test_a_place_falls_as_others_leave(world):
    first, _ = await wait_in_line(world, "a", "b")
    call = watch(world, "b")
    assert (await call.read()).position == 2
    first.call.cancel()
    async with asyncio.timeout(5):
        while (await call.read()).position != 1:
            pass


async def test_a_watch_of_nobody_ends_after_its_patience(world):
    assert await code_of(watch(world, "nobody", patience_seconds=0.05).read()) is grpc.StatusCode.NOT_FOUND
    assert await code_of(watch(world, "nobody", patience_seconds=61).read()) is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_error_of_a_told_time_is_counted(world):
    world.service.dispatcher.expected_wait = lambda waiting, now, *, position=None: 30.0
    await wait_in_line(world, "a")
    assert (await ask(world, "a")).expected_wait.ToMilliseconds() == 30_000
    labels = {"class": "standard", "direction": "early"}
    before = REGISTRY.get_sample_value("tidegate_queue_eta_error_seconds_count", labels) or 0
    call = watch(world, "a")
    assert (await call.read()).position == 1
    world.replica.grant("credit")
    assert [status.state for status in await rest(call)][-1] == DISPATCHED
    assert REGISTRY.get_sample_value("tidegate_queue_eta_error_seconds_count", labels) == before + 1


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("mine", preprocess_pb2.BODY_KIND_GENERATE, "mine"),
        ("", preprocess_pb2.BODY_KIND_GENERATE, ""),
        ("x" * 128, preprocess_pb2.BODY_KIND_GENERATE, ""),
        ("mine", preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS, ""),
    ],
)
def test_the_clients_name_stands_at_the_beginning_of_a_generate_request(name, kind, found):
    message = inference_pb2.GenerateRequest(request_id=name, text="The tide").SerializeToString()
    assert client_request_id(kind, message) == found
