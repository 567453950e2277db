from __future__ import annotations

import asyncio
import time

import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.forecast import DrainRate
from tidegate.scheduler.lanes import LaneLimits, Lanes
from tidegate.scheduler.placement import Weights
from tidegate.scheduler.queue import Queue
from tidegate.scheduler.replica_table import ReplicaLoad, ReplicaTable
from tidegate.scheduler.request import Request, ServiceClass


class Bench:
    """A queue with one replica, whose credits the test grants."""

    def __init__(self):
        now = time.monotonic()
        lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(1000, 10**9, 10**9)))
        table = ReplicaTable(margin_seconds=0.25, silence_seconds=60, now=now)
        table.set_addresses(["a:1"])
        self.replica = table.get("a:1")
        table.connect(self.replica, now)
        table.hear(self.replica, ReplicaLoad(True, 0, 0, 8, 0.01, 0.1), now)
        dispatcher = Dispatcher(lanes, table, DrainRate(10), weights=Weights(0.6, 0.4), alternative_count=2)
        self.changes = 0
        self.queue = Queue(dispatcher, time.monotonic, self._change)

    def _change(self):
        self.changes += 1

    def grant(self, *credit_ids):
        self.replica.book.grant(credit_ids, 60, time.monotonic())

    @property
    def waiting(self):
        return [waiting.request_id for waiting in self.queue.dispatcher.lanes]


@pytest.fixture
def bench():
    return Bench()


def request(name, *, seconds=60.0, service_class=ServiceClass.STANDARD):
    now = time.monotonic()
    return Request(
        request_id=name,
        path="/",
        content_type="",
        is_encoded=False,
        tenant="t",
        arrived_at=now,
        whole_at=now,
        deadline=now + seconds,
        service_class=service_class,
    )


async def test_with_a_credit_in_hand_nobody_waits(bench):
    bench.grant("c")
    placement = await bench.queue.wait(request("r"))
    assert (placement.address, placement.credit_id) == ("a:1", "c")


async def test_requests_get_credits_in_order_as_they_come(bench):
    first = asyncio.create_task(bench.queue.wait(request("first")))
    second = asyncio.create_task(bench.queue.wait(request("second")))
    await asyncio.sleep(0)
    assert bench.waiting == ["first", "second"]
    bench.grant("c1")
    bench.queue.match()
    assert (await first).credit_id == "c1"
    bench.grant("c2")
    bench.queue.match()
    assert (await second).credit_id == "c2"


async def test_every_change_of_what_waits_is_told(bench):
    task = asyncio.create_task(bench.queue.wait(request("r")))
    await asyncio.sleep(0)
    assert bench.changes == 1
    bench.grant("c")
    bench.queue.match()
    await task
    assert bench.changes == 2


async def test_a_deadline_that_passes_ends_the_wait(bench):
    waiting = request("r", seconds=0.05)
    with pytest.raises(TidegateError) as raised:
        await bench.queue.wait(waiting)
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    assert bench.waiting == []
    assert waiting.queue_seconds > 0


async def test_one_that_is_cancelled_leaves_its_lane_at_once(bench):
    task = asyncio.create_task(bench.queue.wait(request("r")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.waiting == []


async def test_a_credit_given_to_one_that_leaves_in_the_same_moment_goes_to_the_next(bench):
    first = asyncio.create_task(bench.queue.wait(request("first")))
    second = asyncio.create_task(bench.queue.wait(request("second")))
    await asyncio.sleep(0)
    bench.grant("c")
    bench.queue.match()
    first.cancel()
    assert (await second).credit_id == "c"
    assert first.cancelled()


async def test_a_credit_that_comes_after_the_cancellation_goes_to_the_next(bench):
    first = asyncio.create_task(bench.queue.wait(request("first")))
    second = asyncio.create_task(bench.queue.wait(request("second")))
    await asyncio.sleep(0)
    first.cancel()
    bench.grant("c")
    bench.queue.match()
    assert (await second).credit_id == "c"
    assert bench.replica.book.in_flight_count == 1


async def test_all_can_be_refused(bench):
    tasks = [asyncio.create_task(bench.queue.wait(request(str(number)))) for number in range(3)]
    await asyncio.sleep(0)
    bench.queue.refuse_all(lambda: TidegateError(Reason.REPLICA_UNAVAILABLE, "gone", retry_after_seconds=1))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result.reason for result in results] == [Reason.REPLICA_UNAVAILABLE] * 3
    assert len({id(result) for result in results}) == 3
    assert bench.waiting == []


async def test_a_request_never_overtakes_one_that_waits_in_its_class(bench):
    first = asyncio.create_task(bench.queue.wait(request("first")))
    await asyncio.sleep(0)
    bench.grant("c1", "c2")
    assert (await bench.queue.wait(request("second"))).credit_id == "c2"
    assert (await first).credit_id == "c1"
