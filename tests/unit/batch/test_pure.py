"""The decisions of the batch service: what may be in flight, whose turn it is, what errors and lines mean."""

from __future__ import annotations

import io
import json
import random
from collections import Counter

import pytest

from tidegate.batch import lines
from tidegate.batch.lines import LineFault
from tidegate.batch.spare import Bounds, allowed_in_flight
from tidegate.batch.turns import Turns
from tidegate.batch.verdicts import Pauses, Verdict, verdict
from tidegate.common.errors import Reason, TidegateError
from tidegate.v1 import replica_pb2, scheduler_pb2

BOUNDS = Bounds(in_flight_limit=8, urgent_waiting_limit=2, reserved_credit_count=1)


def snapshot(
    *, realtime: int = 0, standard: int = 0, batch: int = 0, credit_counts: tuple[int, ...] = (4,), free: int = 0
) -> scheduler_pb2.Snapshot:
    load = replica_pb2.Load(ready=True, slot_count=4 + free, running_request_count=4)
    return scheduler_pb2.Snapshot(
        lanes=[
            scheduler_pb2.LaneSnapshot(service_class=number, waiting_request_count=count)
            for number, count in ((1, realtime), (2, standard), (3, batch))
        ],
        replicas=[
            scheduler_pb2.ReplicaSnapshot(connected=True, credit_count=count, load=load) for count in credit_counts
        ],
    )


@pytest.mark.parametrize(
    ("seen", "in_flight", "allowed"),
    [
        (snapshot(), 0, 3),  # All credits but the reserve.
        (snapshot(), 2, 5),  # Those in flight hold credits of their own.
        (snapshot(credit_counts=(4, 9)), 0, 8),  # The limit.
        (snapshot(realtime=1, standard=1), 0, 3),  # As many as the bound may wait.
        (snapshot(realtime=2, standard=1), 5, 0),
        (snapshot(batch=2), 0, 1),  # The lane's own requests come first.
        (snapshot(batch=9), 4, 0),
        (snapshot(credit_counts=(0,)), 3, 2),  # The reserve is given back when a line ends.
        (snapshot(credit_counts=(1,)), 0, 1),  # A reserve of all capacity would stop everything.
        (snapshot(credit_counts=(0,)), 0, 0),
        (snapshot(credit_counts=(0,), free=1), 0, 1),  # One line asks for credits where there is room.
        (snapshot(credit_counts=(0,), free=1, batch=1), 0, 0),
        (snapshot(credit_counts=()), 0, 0),
    ],
)
def test_no_more_is_in_flight_than_is_spare(seen, in_flight, allowed):
    assert allowed_in_flight(seen, in_flight, BOUNDS) == allowed


def test_a_replica_that_is_away_has_nothing_to_spare():
    seen = snapshot()
    seen.replicas[0].connected = False
    assert allowed_in_flight(seen, 0, BOUNDS) == 0


def test_turns_go_to_the_tenant_with_the_fewest_in_flight():
    turns = Turns()
    for tenant, count in (("big", 50), ("small", 2)):
        for _ in range(count):
            turns.want(tenant)
    order = []
    for _ in range(6):
        tenant = turns.next()
        turns.begin(tenant)
        order.append(tenant)
    assert Counter(order) == {"big": 4, "small": 2}
    assert set(order[:2]) == set(order[2:4]) == {"big", "small"}
    assert turns.next(without=frozenset({"big"})) is None


@pytest.mark.parametrize("seed", range(20))
def test_turns_are_counted_and_leave_nothing_behind(seed):
    choose, turns, wanting, out = random.Random(seed), Turns(), Counter(), Counter()
    for _ in range(500):
        tenant, act = choose.choice("abc"), choose.choice(("want", "unwant", "begin", "end"))
        if act == "want":
            turns.want(tenant)
            wanting[tenant] += 1
        elif act == "unwant" and wanting[tenant]:
            turns.unwant(tenant)
            wanting[tenant] -= 1
        elif act == "begin" and (following := turns.next()) is not None:
            fewest = min(out[each] for each in wanting if wanting[each])
            assert (wanting[following] > 0, out[following]) == (True, fewest)
            turns.begin(following)
            wanting[following] -= 1
            out[following] += 1
        elif act == "end" and out[tenant]:
            turns.end(tenant)
            out[tenant] -= 1
        assert (turns.in_flight, turns.is_wanted) == (out.total(), wanting.total() > 0)
        assert set(turns._last_begun) <= {each for each in "abc" if wanting[each] or out[each]}


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_only_what_speaks_of_the_mesh_is_tried_again(reason):
    found = verdict(TidegateError(reason, "m"), 1, 3)
    if reason in (Reason.SERVER_IS_OVERLOADED, Reason.REPLICA_UNAVAILABLE):
        assert found is Verdict.WAIT
        assert verdict(TidegateError(reason, "m"), 1_000, 3) is Verdict.WAIT
    elif reason is Reason.RATE_LIMIT_EXCEEDED:
        assert found is Verdict.WAIT_TENANT
    elif reason in (Reason.DEADLINE_EXCEEDED, Reason.CANCELLED, Reason.NUMERICAL_ERROR, Reason.INTERNAL_ERROR):
        assert (found, verdict(TidegateError(reason, "m"), 3, 3)) == (Verdict.AGAIN, Verdict.FAILED)
    else:
        assert found is Verdict.FAILED


def test_a_pause_is_what_the_refusal_says_and_grows_with_each_in_a_row():
    pauses = Pauses(1.0, 10.0)
    assert [pauses.next_seconds(None) for _ in range(5)] == [1, 2, 4, 8, 10]
    pauses.reset()
    assert [pauses.next_seconds(3.0), pauses.next_seconds(None), pauses.next_seconds(99.0)] == [3, 2, 10]


def test_lines_are_split_with_their_numbers_and_long_ones_are_told():
    file = io.BytesIO(b"one\n\n" + b"x" * 25 + b"\nfour\r\n" + b"y" * 10 + b"\nlast")
    assert list(lines.split(file, 10)) == [(1, b"one"), (3, None), (4, b"four"), (5, b"y" * 10), (6, b"last")]


def test_a_body_is_sent_as_the_client_wrote_it():
    body = '{"model":  "m", "x": 1.50, "ü": "\\u00fc"}'
    text = f'{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}, "more": 1}}'
    line = lines.parse(text.encode(), "/v1/completions")
    assert (line.custom_id, line.body) == ("a", body.encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"1", b"\xff", b'{"custom_id": "a"', b"null"])
def test_what_is_no_json_object_is_an_invalid_line(text):
    with pytest.raises(LineFault) as raised:
        lines.parse(text, "/v1/completions")
    assert raised.value.code == "invalid_json_line"


@pytest.mark.parametrize(
    ("custom_id", "code"), [(1, "invalid_value"), ("x" * 513, "invalid_value"), ("", "missing_required_parameter")]
)
def test_a_custom_id_is_a_text_of_bounded_length(custom_id, code):
    text = json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {}})
    with pytest.raises(LineFault) as raised:
        lines.parse(text.encode(), "/v1/completions")
    assert raised.value.code == code


def test_an_answer_is_one_line_whatever_its_spacing():
    text = lines.answered("batch_req_1", "a", "r", b'{\n "choices": [\n],\n "usage": null }')
    assert b"\n" not in text
    response = {"status_code": 200, "request_id": "r", "body": {"choices": [], "usage": None}}
    assert json.loads(text) == {"id": "batch_req_1", "custom_id": "a", "response": response, "error": None}


def test_an_answer_without_usage_counts_no_tokens():
    for body in (b"{}", b"[]", b'{"usage": null}', b'{"usage": {"prompt_tokens": "many"}}'):
        assert lines.usage_of(body) == lines.Usage()
