"""Shares of tenants inside a lane, floors between lanes, and the order inside a tenant."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from tidegate.scheduler.config import Settings
from tidegate.scheduler.lanes import OWED_REQUESTS, LaneLimits, Lanes, Waiting
from tidegate.scheduler.request import ServiceClass

REALTIME, STANDARD, BATCH = ServiceClass
LIMITS = dict.fromkeys(ServiceClass, LaneLimits(10**6, 10**9, 10**12))


def place(tenant, cost=100.0, service_class=STANDARD, **fields):
    values = {
        "request_id": "",
        "token_count": 1,
        "answer_token_count": 1,
        "byte_count": 1,
        "since": 0.0,
        "deadline": 60.0,
    }
    return Waiting(**{**values, "service_class": service_class, "tenant": tenant, "cost": cost, **fields})


def served(lanes, cost):
    """What each tenant and each class gets of so much cost, taken as fast as it comes."""
    by_tenant, by_class, total = Counter(), Counter(), 0.0
    while total < cost:
        waiting = lanes.next
        lanes.take(waiting)
        by_tenant[waiting.tenant] += waiting.cost
        by_class[waiting.service_class] += waiting.cost
        total += waiting.cost
    return by_tenant, by_class


def test_a_tenant_that_asks_for_much_more_gets_no_more_than_the_others():
    lanes = Lanes(LIMITS)
    for _ in range(1000):
        lanes.add(place("greedy", cost=500))
    for tenant in "abcdefghi":
        for _ in range(100):
            lanes.add(place(tenant))
    by_tenant, _ = served(lanes, 50_000)
    assert max(by_tenant.values()) - min(by_tenant.values()) <= 500


def test_weights_are_shares():
    lanes = Lanes(LIMITS, weights={"two": 2.0, "four": 4.0})
    for tenant in ("one", "two", "four"):
        for _ in range(1000):
            lanes.add(place(tenant))
    by_tenant, _ = served(lanes, 70_000)
    shares = {tenant: cost / 70_000 for tenant, cost in by_tenant.items()}
    assert shares == pytest.approx({"one": 1 / 7, "two": 2 / 7, "four": 4 / 7}, abs=0.005)


def test_idle_time_earns_nothing():
    lanes = Lanes(LIMITS)
    for _ in range(200):
        lanes.add(place("busy"))
    served(lanes, 10_000)
    for _ in range(200):
        lanes.add(place("late"))
    by_tenant, _ = served(lanes, 2_000)
    assert by_tenant == {"busy": 1_000, "late": 1_000}


def test_what_was_charged_too_much_or_too_little_is_made_up_for():
    lanes = Lanes(LIMITS)
    for _ in range(100):
        lanes.add(place("a"))
        lanes.add(place("b"))
    lanes.charge(STANDARD, "a", 1_000)
    by_tenant, _ = served(lanes, 1_000)
    assert by_tenant == {"b": 1_000}
    lanes.charge(STANDARD, "b", -500)
    assert served(lanes, 500)[0] == {"b": 500}


def test_the_lowest_lane_keeps_its_floor_under_a_flood():
    lanes = Lanes(LIMITS, floors={STANDARD: 0.1, BATCH: 0.02})
    for _ in range(3000):
        lanes.add(place("t", service_class=REALTIME))
        lanes.add(place("t", service_class=STANDARD))
        lanes.add(place("t", service_class=BATCH))
    _, by_class = served(lanes, 200_000)
    assert by_class[BATCH] / 200_000 == pytest.approx(0.02, abs=0.001)
    assert by_class[STANDARD] / 200_000 == pytest.approx(0.1, abs=0.002)


def test_a_lane_of_small_requests_keeps_its_floor_beside_large_ones():
    lanes = Lanes(LIMITS, floors={STANDARD: 0.3})
    for _ in range(3000):
        lanes.add(place("t", service_class=REALTIME, cost=8_000))
        for _ in range(20):
            lanes.add(place("t", service_class=STANDARD, cost=200))
    _, by_class = served(lanes, 2_000_000)
    assert by_class[STANDARD] / 2_000_000 == pytest.approx(0.3, abs=0.02)


def test_a_lane_that_nobody_asks_for_any_more_is_owed_less_and_less():
    lanes = Lanes(LIMITS, floors={BATCH: 0.1})
    for _ in range(100_000):
        lanes.add(place("t", service_class=REALTIME, cost=10))
    lanes.refuse(BATCH, 5_000)
    served(lanes, 50_000)
    assert lanes.floor_cost(BATCH, "t", 3_000) == 0
    served(lanes, 900_000)
    assert lanes.floor_cost(BATCH, "t", 100) > 0


def test_floors_leave_something_to_realtime():
    Settings(standard_floor=0.5, batch_floor=0.4)
    with pytest.raises(ValueError, match="standard_floor and batch_floor: together at most"):
        Settings(standard_floor=0.5, batch_floor=0.41)


def test_a_large_request_in_the_lowest_lane_is_not_starved():
    lanes = Lanes(LIMITS, floors={BATCH: 0.02})
    lanes.add(place("t", cost=5_000, service_class=BATCH))
    for _ in range(10_000):
        lanes.add(place("t", service_class=REALTIME))
    _, by_class = served(lanes, 300_000)
    assert by_class[BATCH] == 5_000


def test_a_lane_that_was_empty_is_owed_nothing():
    lanes = Lanes(LIMITS, floors={BATCH: 0.5})
    for _ in range(100):
        lanes.add(place("t", service_class=REALTIME))
    served(lanes, 5_000)
    lanes.add(place("t", service_class=BATCH))
    assert lanes.next.service_class is REALTIME


def test_a_lane_that_is_refused_is_owed_a_few_requests():
    lanes = Lanes(LIMITS, floors={BATCH: 0.1})
    for _ in range(100):
        lanes.add(place("t", service_class=REALTIME))
    lanes.refuse(BATCH, 10)
    served(lanes, 5_000)
    for _ in range(10):
        lanes.add(place("t", cost=10, service_class=BATCH))
    _, by_class = served(lanes, 45)
    assert by_class[BATCH] == OWED_REQUESTS * 10  # And what more of it waits has to be paid for again.


def test_a_large_request_that_is_refused_can_be_paid_for_and_its_lane_is_owed_no_more_than_that():
    lanes = Lanes(LIMITS, floors={BATCH: 0.1})
    for _ in range(1000):
        lanes.add(place("t", service_class=REALTIME))
    for cost in [10] * 100 + [2_000]:
        lanes.refuse(BATCH, cost)
    served(lanes, 30_000)
    lanes.refuse(BATCH, 10)
    assert lanes.floor_cost(BATCH, "t", 1_900) == 0
    assert lanes.floor_cost(BATCH, "t", 2_001) > 0


def test_a_lane_that_could_not_be_served_for_long_is_owed_a_few_requests():
    lanes = Lanes(LIMITS, floors={BATCH: 0.1})
    urgent = [place("t", service_class=REALTIME) for _ in range(200)]
    for one in urgent:
        lanes.add(one)
    for _ in range(20):
        lanes.add(place("t", cost=10, service_class=BATCH))
    for one in urgent[:100]:  # Nothing was free that batch may use.
        lanes.take(one)
    _, by_class = served(lanes, 45)
    assert by_class[BATCH] == OWED_REQUESTS * 10


def test_what_a_floor_still_has_to_pay_for_is_known():
    lanes = Lanes(LIMITS, floors={BATCH: 0.5})
    lanes.refuse(BATCH, 10)
    assert lanes.floor_cost(BATCH, "t", 10) == 20
    lanes.add(place("t", cost=16, service_class=REALTIME))
    served(lanes, 16)
    assert lanes.floor_cost(BATCH, "t", 10) == 4
    assert lanes.floor_cost(STANDARD, "t", 10) == math.inf


@pytest.mark.parametrize("order", ["fcfs", "wfq", "edf", "srpt"])
def test_each_order_has_its_own_first(order):
    lanes = Lanes(LIMITS, order=order)
    lanes.add(place("t", request_id="old", since=0.0, expected_seconds=5.0, deadline=90))
    lanes.add(place("t", request_id="short", since=1.0, expected_seconds=0.5, deadline=80))
    lanes.add(place("t", request_id="urgent", since=2.0, expected_seconds=4.0, deadline=9))
    firsts = {"fcfs": "old", "wfq": "short", "edf": "urgent", "srpt": "short"}
    assert lanes.next.request_id == firsts[order]


def test_wfq_lets_those_that_try_again_wait_a_little_longer():
    lanes = Lanes(LIMITS, order="wfq")
    lanes.add(place("t", request_id="third try", expected_seconds=1.0, retry_count=2))
    lanes.add(place("t", request_id="first try", expected_seconds=1.1))
    assert lanes.next.request_id == "first try"


def test_srpt_lets_nobody_wait_for_ever():
    lanes = Lanes(LIMITS, order="srpt")
    lanes.add(place("t", request_id="long", since=0.0, expected_seconds=10.0))
    for second in range(1, 200):
        lanes.add(place("t", request_id="short", since=float(second), expected_seconds=0.1))
    order = [waiting.request_id for waiting in lanes]
    assert order.index("long") < 110


def test_a_tenant_has_a_share_of_the_bounds_and_the_default_tenant_all():
    lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(10, 1000, 1000, tenant_share=0.5)))
    for tenant in ("a", "default"):
        for _ in range(5):
            lanes.add(place(tenant))
    lane = lanes.lane(STANDARD)
    assert lane.full_bound(1, 1, "a") == "requests"
    lanes.remove(lanes.lane(STANDARD).queue.tenant("default").head)
    assert lane.full_bound(1, 1, "a") == "requests of one tenant"
    assert lane.full_bound(1, 1, "b") == ""
    assert lane.full_bound(1, 1, "default") == ""


def test_the_cost_before_a_request_is_bounded_by_fair_turns():
    lanes = Lanes(LIMITS)
    for _ in range(100):
        lanes.add(place("greedy"))
    assert lanes.cost_before(STANDARD, "greedy", 100) == 10_000
    assert lanes.cost_before(STANDARD, "modest", 100) == 100
    lanes.add(place("t", service_class=REALTIME, cost=7))
    assert lanes.cost_before(STANDARD, "modest", 100) == 107


@pytest.mark.parametrize("seed", range(5))
def test_random_runs_lose_nothing_and_serve_all_that_ask_alike(seed):
    chance = random.Random(seed)
    lanes = Lanes(LIMITS, floors={STANDARD: 0.1, BATCH: 0.02})
    alive, costs = set(), Counter()
    for step in range(3_000):
        match chance.randrange(5):
            case 0 | 1 | 2:
                waiting = place(
                    chance.choice("abc"), chance.uniform(1, 300), chance.choice(list(ServiceClass)), since=step
                )
                lanes.add(waiting)
                alive.add(waiting)
            case 3 if alive:
                waiting = lanes.next
                lanes.take(waiting)
                alive.remove(waiting)
                costs[waiting.tenant] += waiting.cost
            case 4 if alive and chance.random() < 0.3:
                waiting = chance.choice(sorted(alive, key=id))
                lanes.remove(waiting)
                alive.remove(waiting)
        assert len(lanes) == len(alive)
        assert (lanes.next in alive) if alive else lanes.next is None
    for service_class in ServiceClass:
        lane = lanes.lane(service_class)
        own = [waiting for waiting in alive if waiting.service_class is service_class]
        assert set(lane) == set(own)
        assert lane.cost == pytest.approx(sum(waiting.cost for waiting in own))
    while (waiting := lanes.next) is not None:
        lanes.take(waiting)
        alive.remove(waiting)
    assert not alive
    assert not len(lanes)
