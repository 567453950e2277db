from __future__ import annotations

from dataclasses import replace

import pytest

from tidegate.scheduler.replica_table import ReplicaLoad, ReplicaTable

LOAD = ReplicaLoad(
    is_ready=True,
    running_request_count=2,
    waiting_request_count=1,
    slot_count=8,
    seconds_per_output_token=0.01,
    time_to_first_token_seconds=0.1,
)
NOT_READY = ReplicaLoad(False, 0, 0, 8, 0.0, 0.0)


@pytest.fixture
def table():
    table = ReplicaTable(margin_seconds=0.25, silence_seconds=3, now=0)
    table.set_addresses(["a:1"])
    return table


def test_the_table_follows_the_addresses(table):
    kept = table.get("a:1")
    assert table.set_addresses(["a:1", "b:1", "b:1"]) == (["b:1"], [])
    assert table.set_addresses(["a:1"]) == ([], ["b:1"])
    assert table.get("a:1") is kept
    assert [replica.address for replica in table] == ["a:1"]


def test_a_replica_is_ready_when_it_is_connected_and_says_so(table):
    replica = table.get("a:1")
    assert table.ready(0) == []
    table.connect(replica, 0)
    assert table.ready(0) == []
    table.hear(replica, LOAD, 0)
    assert table.ready(0) == [replica]
    table.hear(replica, NOT_READY, 0)
    assert table.ready(0) == []


def test_schedulers_are_as_many_as_a_replica_knows(table):
    table.set_addresses(["a:1", "b:1"])
    assert table.scheduler_count(0) == 1
    for address, load in (("a:1", LOAD), ("b:1", replace(LOAD, scheduler_count=2))):
        table.connect(table.get(address), 0)
        table.hear(table.get(address), load, 0)
    assert table.scheduler_count(0) == 2


def test_a_silent_replica_is_not_ready(table):
    replica = table.get("a:1")
    table.connect(replica, 0)
    table.hear(replica, LOAD, 0)
    assert table.is_ready(replica, 3)
    assert not table.is_ready(replica, 3.1)


def test_a_stream_that_ends_takes_credits_and_load_with_it(table):
    replica = table.get("a:1")
    table.connect(replica, 0)
    table.hear(replica, LOAD, 0)
    replica.book.grant(["x", "y"], 10, 0)
    replica.book.spend(0)
    table.disconnect(replica, "gone")
    assert (replica.book.count, replica.book.in_flight_count, replica.load) == (0, 0, None)
    assert replica.last_error == "gone"
    assert table.ready(0) == []


def test_the_busy_count_is_the_larger_of_what_it_said_and_what_was_sent(table):
    replica = table.get("a:1")
    table.connect(replica, 0)
    table.hear(replica, LOAD, 0)
    assert replica.busy_count == 3
    replica.book.grant(map(str, range(5)), 10, 0)
    for _ in range(5):
        replica.book.spend(0)
    assert replica.busy_count == 5


def test_hearing_the_load_drops_requests_that_never_arrived(table):
    replica = table.get("a:1")
    table.connect(replica, 0)
    replica.book.grant(map(str, range(5)), 1, 0)
    for _ in range(5):
        replica.book.spend(0)
    table.hear(replica, LOAD, 2)
    assert replica.book.in_flight_count == LOAD.busy_count


def test_absence_counts_from_the_last_time_that_one_was_ready(table):
    replica = table.get("a:1")
    assert table.absence_seconds(4) == 4
    table.connect(replica, 4)
    table.hear(replica, LOAD, 4)
    table.note_presence(5)
    assert table.absence_seconds(5) == 0
    table.disconnect(replica, "gone")
    assert table.absence_seconds(7) == 2
