"""Several schedulers shown as one."""

from __future__ import annotations

from tidegate.common.snapshots import together
from tidegate.v1 import scheduler_pb2


def snapshot(number: int, **fields) -> scheduler_pb2.Snapshot:
    made = scheduler_pb2.Snapshot(scheduler_id=f"s{number}", **fields)
    for service_class in (1, 2, 3):
        lane = made.lanes.add(service_class=service_class, waiting_request_count=number, drain_rate=2.0)
        lane.request_limit, lane.tenant_count, lane.shed_share = 10, number, 0.1 * number
        lane.oldest_wait.FromSeconds(number)
    made.totals.received, made.totals.abandoned = 10 * number, number
    made.totals.refused["OVERLOADED"] = number
    made.dependencies.add(name="cache", reachable=True)
    return made


def add_replica(made: scheduler_pb2.Snapshot, name: str, *, connected: bool = True, **fields) -> None:
    replica = made.replicas.add(connected=connected, **fields)
    replica.load.replica = name


def test_one_is_itself():
    one = snapshot(3)
    add_replica(one, "a", credit_count=2)
    assert together([one]) == one


def test_counts_are_added_up_and_of_the_rest_it_is_the_worst():
    first, second = snapshot(1, brownout_step=2), snapshot(4, limited_tenant_count=3)
    merged = together([first, second])
    assert merged.scheduler_id == "s1 s4"
    assert (merged.brownout_step, merged.limited_tenant_count) == (2, 3)
    for lane in merged.lanes:
        assert (lane.waiting_request_count, lane.request_limit, lane.drain_rate) == (5, 20, 4.0)
        assert (lane.tenant_count, lane.oldest_wait.seconds) == (4, 4)
        assert abs(lane.shed_share - 0.4) < 1e-9
    assert (merged.totals.received, merged.totals.abandoned, dict(merged.totals.refused)) == (50, 5, {"OVERLOADED": 5})
    assert first == snapshot(1, brownout_step=2)


def test_a_replicas_credits_are_those_of_all_schedulers():
    first, second = snapshot(1), snapshot(2)
    add_replica(first, "a", credit_count=2, in_flight_count=1)
    add_replica(second, "b", credit_count=7)
    add_replica(second, "a", credit_count=3, in_flight_count=4, preempting_credit_count=5)
    a, b = together([first, second]).replicas
    assert (a.load.replica, a.credit_count, a.in_flight_count, a.preempting_credit_count) == ("a", 5, 5, 5)
    assert (b.load.replica, b.credit_count) == ("b", 7)


def test_what_one_of_them_cannot_reach_is_shown():
    first, second = snapshot(1), snapshot(2)
    add_replica(first, "a")
    add_replica(second, "a", connected=False, last_error="no route")
    second.dependencies[0].reachable, second.dependencies[0].last_error = False, "gone"
    second.flagged_tenants.add(tenant="acme")
    merged = together([first, second])
    assert (merged.replicas[0].connected, merged.replicas[0].last_error) == (False, "no route")
    assert (merged.dependencies[0].reachable, merged.dependencies[0].last_error) == (False, "gone")
    assert [each.tenant for each in merged.flagged_tenants] == ["acme"]
