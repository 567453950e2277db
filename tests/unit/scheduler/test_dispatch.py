from __future__ import annotations

import random

import pytest

from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.forecast import DrainRate, WorkRates
from tidegate.scheduler.lanes import LaneLimits, Lanes, Waiting
from tidegate.scheduler.placement import Weights
from tidegate.scheduler.placer import Placer
from tidegate.scheduler.replica_table import ReplicaLoad, ReplicaTable
from tidegate.scheduler.request import ServiceClass

READY = ReplicaLoad(True, 0, 0, 8, 0.01, 0.1)
AWAY = ReplicaLoad(False, 0, 0, 8, 0.01, 0.1)


@pytest.fixture
def dispatcher():
    lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(1000, 10**9, 10**9)))
    table = ReplicaTable(margin_seconds=0.25, silence_seconds=3, now=0)
    table.set_addresses(["a:1", "b:1", "c:1"])
    for replica in table:
        table.connect(replica, 0)
        table.hear(replica, READY, 0)
    return dispatcher_of(lanes, table)


def dispatcher_of(lanes, table, work=None):
    return Dispatcher(lanes, table, DrainRate(10), weights=Weights(0.6, 0.4), alternative_count=2, work=work)


def place(name, service_class=ServiceClass.STANDARD, now=0.0, cost=1.0):
    return Waiting(name, service_class, 10, 5, 100, now, now + 60, cost=cost)


def matched(dispatcher, now=0.0):
    return [
        (waiting.request_id, placement.address, placement.credit_id) for waiting, placement in dispatcher.match(now)
    ]


def twenty_leave(dispatcher):
    """One after the other, within two seconds."""
    dispatcher.match(0)
    for number in range(1, 21):
        dispatcher.table.get("a:1").book.grant([str(number)], 10, number * 0.1)
        dispatcher.match(number * 0.1)


def test_what_waits_gets_the_credits_in_order_of_urgency(dispatcher):
    for name, service_class in [("b", ServiceClass.BATCH), ("s", ServiceClass.STANDARD), ("r", ServiceClass.REALTIME)]:
        dispatcher.add(place(name, service_class))
    assert matched(dispatcher) == []
    dispatcher.table.get("a:1").book.grant(["1", "2"], 10, 0)
    assert matched(dispatcher) == [("r", "a:1", "1"), ("s", "a:1", "2")]
    assert dispatcher.lanes.next.request_id == "b"


def test_a_placement_names_the_next_best_too(dispatcher):
    dispatcher.table.get("b:1").book.grant(["1"], 10, 0)
    dispatcher.table.hear(dispatcher.table.get("c:1"), ReplicaLoad(True, 8, 0, 8, 0.01, 0.1), 0)
    dispatcher.add(place("x"))
    [(_, placement)] = dispatcher.match(0)
    assert (placement.address, placement.alternatives) == ("b:1", ("a:1", "c:1"))


def test_a_replica_that_is_not_ready_is_neither_chosen_nor_named(dispatcher):
    dispatcher.table.get("a:1").book.grant(["1"], 10, 0)
    dispatcher.table.get("b:1").book.grant(["2"], 10, 0)
    dispatcher.table.hear(dispatcher.table.get("a:1"), AWAY, 0)
    dispatcher.add(place("x"))
    [(_, placement)] = dispatcher.match(0)
    assert (placement.address, placement.alternatives) == ("b:1", ("c:1",))


def test_a_credit_put_back_goes_to_the_next(dispatcher):
    dispatcher.table.get("a:1").book.grant(["1"], 10, 0)
    dispatcher.add(place("first"))
    dispatcher.add(place("second"))
    [(_, placement)] = dispatcher.match(0)
    dispatcher.put_back(placement)
    assert matched(dispatcher) == [("second", "a:1", "1")]


def test_a_credit_of_a_replica_that_is_gone_is_not_put_back(dispatcher):
    dispatcher.table.get("a:1").book.grant(["1"], 10, 0)
    dispatcher.add(place("first"))
    [(_, placement)] = dispatcher.match(0)
    dispatcher.table.set_addresses(["b:1"])
    dispatcher.put_back(placement)
    dispatcher.add(place("second"))
    assert matched(dispatcher) == []


def test_a_credit_of_an_earlier_stream_is_not_put_back(dispatcher):
    replica = dispatcher.table.get("a:1")
    replica.book.grant(["1"], 10, 0)
    dispatcher.add(place("first"))
    [(_, placement)] = dispatcher.match(0)
    dispatcher.table.disconnect(replica, "gone")
    dispatcher.table.connect(replica, 1)
    dispatcher.put_back(placement)
    assert replica.book.count == 0


def test_the_expected_wait_follows_the_measured_rate(dispatcher):
    for number in range(40):
        dispatcher.add(place(str(number)))
    twenty_leave(dispatcher)
    last = list(dispatcher.lanes)[-1]
    assert dispatcher.lanes.position(last) == 20
    assert dispatcher.expected_wait(last, 2.0) == pytest.approx(2.0, rel=0.05)


def test_the_expected_wait_goes_by_what_those_before_cost(dispatcher):
    dispatcher = dispatcher_of(dispatcher.lanes, dispatcher.table, WorkRates(10))
    for number in range(20):
        dispatcher.add(place(str(number)))
    for number in range(20, 40):
        dispatcher.add(place(str(number), cost=3.0))
    twenty_leave(dispatcher)
    # Ten that cost 1 left in a second; the 20 that cost 3 take six.
    last = list(dispatcher.lanes)[-1]
    assert dispatcher.expected_wait(last, 2.0) == pytest.approx(6.0, rel=0.05)
    dispatcher.add(place("urgent", ServiceClass.REALTIME, cost=10.0))
    assert dispatcher.expected_wait(last, 2.0) == pytest.approx(7.0, rel=0.05)


def test_the_expected_wait_leaves_room_for_more_urgent_requests_that_come_meanwhile(dispatcher):
    work = WorkRates(10)
    dispatcher = dispatcher_of(dispatcher.lanes, dispatcher.table, work)
    for number in range(30):
        dispatcher.add(place(str(number)))
    dispatcher.match(0)
    for number in range(1, 41):
        if number % 2:
            dispatcher.add(place(f"urgent {number}", ServiceClass.REALTIME))
        dispatcher.table.get("a:1").book.grant([str(number)], 10, number * 0.1)
        dispatcher.match(number * 0.1)
    *_, last = dispatcher.lanes
    urgent, own = dispatcher.lanes.cost_until(last, dispatcher.lanes.position(last))
    in_all, in_lane = work.rate(4.0), work.lane_rate(ServiceClass.STANDARD, 4.0)
    assert in_lane < 0.6 * in_all
    assert dispatcher.expected_wait(last, 4.0) == pytest.approx(own / in_lane)
    assert own / in_lane > 1.3 * (urgent + own) / in_all


def test_behind_many_more_urgent_ones_the_expected_wait_is_what_the_floor_takes(dispatcher):
    lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(1000, 10**9, 10**9)), floors={ServiceClass.STANDARD: 0.2})
    dispatcher = dispatcher_of(lanes, dispatcher.table, WorkRates(10))
    for number in range(1000):
        dispatcher.add(place(f"urgent {number}", ServiceClass.REALTIME))
    for number in range(20):
        dispatcher.add(place(str(number)))
    twenty_leave(dispatcher)
    *_, last = lanes
    left = len(lanes.lane(ServiceClass.STANDARD))
    assert left < 20
    assert dispatcher.expected_wait(last, 2.0) == pytest.approx(left / (0.2 * 10), rel=0.3)


@pytest.mark.parametrize("seed", range(6))
def test_random_runs_leave_no_credit_idle_while_something_waits(dispatcher, seed):
    chance, now = random.Random(seed), 0.0
    spent: set[str] = set()
    placed: set[str] = set()
    for number in range(800):
        now += chance.random() * 0.1
        replica = chance.choice(list(dispatcher.table))
        match chance.randrange(6):
            case 0 | 1:
                dispatcher.add(place(str(number), chance.choice(list(ServiceClass)), now))
            case 2:
                replica.book.grant([f"c{number}"], chance.uniform(0.2, 2), now)
            case 3:
                dispatcher.table.hear(replica, chance.choice([READY, READY, AWAY]), now)
            case 4 if len(dispatcher.lanes):
                dispatcher.leave(chance.choice(list(dispatcher.lanes)), now)
            case _:
                dispatcher.table.disconnect(replica, "gone")
                dispatcher.table.connect(replica, now)
        order = list(dispatcher.lanes)
        result = dispatcher.match(now)
        assert [waiting for waiting, _ in result] == order[: len(result)]
        for waiting, placement in result:
            assert placement.credit_id not in spent
            assert waiting.request_id not in placed
            assert dispatcher.table.is_ready(dispatcher.table.get(placement.address), now)
            spent.add(placement.credit_id)
            placed.add(waiting.request_id)
        idle = any(each.book.can_spend(now) for each in dispatcher.table.ready(now))
        assert not (idle and len(dispatcher.lanes))


@pytest.fixture
def paced(dispatcher):
    """A dispatcher that counts work, one replica of 64 slots, and its placer, which lets half of them begin at once."""
    placer = Placer(dispatcher.table, Weights(0.6, 0.4), alternative_count=0, start_share=0.5)
    return Dispatcher(
        dispatcher.lanes,
        dispatcher.table,
        dispatcher.drain,
        weights=placer.weights,
        alternative_count=0,
        work=WorkRates(10.0),
        placer=placer,
    )


def let_wait(dispatcher, count):
    for number in range(count):
        dispatcher.add(place(str(number)))


def pass_seconds(dispatcher, seconds, credits_a_second=0):
    replica = dispatcher.table.get("a:1")
    for second in seconds:
        replica.book.grant([f"{second}-{number}" for number in range(credits_a_second)], 60, second)
        dispatcher.table.hear(replica, ReplicaLoad(True, 0, 0, 64, 0.01, 0.1), second)
        for half in (0.0, 0.6):
            matched(dispatcher, second + half)


def test_what_leaves_into_empty_slots_is_no_rate_of_work(paced):
    paced.table.get("a:1").book.grant([str(number) for number in range(64)], 60, 0)
    let_wait(paced, 150)
    pass_seconds(paced, range(20))
    assert len(paced.lanes) == 150 - 64
    assert paced._work.rate(20.0) is None


@pytest.mark.parametrize("credits_a_second", [5, 48])
def test_the_rate_of_work_is_of_all_that_leaves_once_every_slot_has_been_taken(paced, credits_a_second):
    """48 freed at once are more than may begin at once: some of them leave while slots stand empty for a moment."""
    let_wait(paced, 2_000)
    pass_seconds(paced, range(20), credits_a_second)
    left_a_second = (2_000 - len(paced.lanes)) / 20
    assert left_a_second >= 5
    assert paced._work.rate(20.0) == pytest.approx(left_a_second, rel=0.15)
