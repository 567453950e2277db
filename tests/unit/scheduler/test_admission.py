from __future__ import annotations

import pytest

from tidegate.common.errors import Reason
from tidegate.scheduler.admission import Admission, Conditions
from tidegate.scheduler.lanes import LaneLimits, Lanes, Waiting
from tidegate.scheduler.request import Request, ServiceClass

NOW = 1000.0


def conditions(**changes):
    values = {
        "now": NOW,
        "drain_rate": None,
        "absence_seconds": 0.0,
        "held_request_count": 1,
        "random_share": 0.0,
    }
    return Conditions(**{**values, **changes})


def request(*, deadline_in=60.0, service_class=ServiceClass.STANDARD, named_class=None, tokens=10, byte_count=100):
    return Request(
        request_id="r",
        path="/v1/chat/completions",
        content_type="application/json",
        is_encoded=False,
        tenant="t",
        arrived_at=NOW - 1,
        whole_at=NOW - 1,
        deadline=None if deadline_in is None else NOW + deadline_in,
        named_class=named_class,
        service_class=service_class,
        prompt_token_count=tokens,
        body_byte_count=byte_count,
    )


@pytest.fixture
def lanes():
    return Lanes(dict.fromkeys(ServiceClass, LaneLimits(request_limit=100, token_limit=10_000, byte_limit=100_000)))


@pytest.fixture
def admission(lanes):
    return Admission(lanes, replica_grace_seconds=5, held_request_limit=200, default_retry_seconds=5)


def fill(lanes, count, service_class=ServiceClass.STANDARD, tokens=10, byte_count=100):
    for number in range(count):
        lanes.add(Waiting(str(number), service_class, tokens, 1, byte_count, NOW, NOW + 60))


def test_a_request_with_room_and_time_may_wait(admission, lanes):
    fill(lanes, 10)
    assert admission.refusal(request(), conditions(drain_rate=1.0)) is None


def test_a_full_lane_refuses_and_others_do_not(admission, lanes):
    fill(lanes, 100)
    refused = admission.refusal(request(), conditions())
    assert refused.reason is Reason.SERVER_IS_OVERLOADED
    assert refused.message == "The standard queue is full by requests; 100 requests wait in it"
    assert admission.refusal(request(service_class=ServiceClass.REALTIME), conditions()) is None


@pytest.mark.parametrize(("size", "word"), [({"tokens": 9_991}, "tokens"), ({"byte_count": 99_901}, "bytes")])
def test_a_lane_is_full_by_tokens_and_bytes_too(admission, lanes, size, word):
    fill(lanes, 1)
    refused = admission.refusal(request(**size), conditions())
    assert refused.message == f"The standard queue is full by {word}; 1 requests wait in it"


FLOOR = 0.1


@pytest.fixture
def bounded():
    """What waits in all lanes together is bounded, and batch has a floor."""
    limits = LaneLimits(request_limit=100, token_limit=10_000, byte_limit=100_000)
    lanes = Lanes(dict.fromkeys(ServiceClass, limits), floors={ServiceClass.BATCH: FLOOR})
    total = LaneLimits(request_limit=60, token_limit=1_000, byte_limit=10_000)
    return lanes, Admission(
        lanes, replica_grace_seconds=5, held_request_limit=200, default_retry_seconds=5, total_limits=total
    )


@pytest.mark.parametrize(
    ("count", "size", "word"),
    [(60, {"tokens": 1}, "requests"), (50, {"tokens": 501}, "tokens"), (50, {"byte_count": 5_001}, "bytes")],
)
def test_all_lanes_together_are_full_by_requests_tokens_and_bytes(bounded, count, size, word):
    lanes, admission = bounded
    fill(lanes, count // 2, ServiceClass.REALTIME)
    fill(lanes, count // 2, ServiceClass.STANDARD)  # Which has no floor here.
    refused = admission.refusal(request(**size), conditions())
    assert refused.reason is Reason.SERVER_IS_OVERLOADED
    assert refused.message == f"The queues are full by {word}; {count} requests wait"
    lanes.remove(lanes.next_of(ServiceClass.REALTIME))
    assert admission.refusal(request(**{name: value - 1 for name, value in size.items()}), conditions()) is None


@pytest.mark.parametrize(("service_class", "share"), [(ServiceClass.BATCH, FLOOR), (ServiceClass.REALTIME, 1 - FLOOR)])
def test_a_lane_has_its_share_of_the_bound_on_all_lanes_whatever_waits_in_the_others(bounded, service_class, share):
    lanes, admission = bounded
    fill(lanes, 60, ServiceClass.STANDARD)
    for _ in range(round(share * 60)):
        assert admission.refusal(request(service_class=service_class), conditions()) is None
        fill(lanes, 1, service_class)
    assert admission.refusal(request(service_class=service_class), conditions()) is not None


def test_a_wait_beyond_the_deadline_is_refused_with_the_time_that_is_missing(admission, lanes):
    fill(lanes, 90)
    refused = admission.refusal(request(deadline_in=60), conditions(drain_rate=1.0))
    assert refused.reason is Reason.SERVER_IS_OVERLOADED
    assert refused.message == ("90 requests wait before this one, for about 90.0 s, and its deadline is in 60.0 s")
    assert refused.retry_after_seconds == 30


def test_only_what_leaves_before_counts_into_the_wait(admission, lanes):
    fill(lanes, 90, ServiceClass.BATCH)
    assert admission.refusal(request(deadline_in=60), conditions(drain_rate=1.0)) is None


def test_an_unknown_rate_refuses_nobody(admission, lanes):
    fill(lanes, 99)
    assert admission.refusal(request(deadline_in=0.1), conditions(drain_rate=None)) is None


def test_a_rate_of_zero_refuses_with_the_longest_time(admission, lanes):
    fill(lanes, 1)
    refused = admission.refusal(request(), conditions(drain_rate=0.0))
    assert refused.retry_after_seconds == 3600


def test_a_deadline_that_has_passed_is_told_as_such(admission):
    refused = admission.refusal(request(deadline_in=0), conditions())
    assert refused.reason is Reason.DEADLINE_EXCEEDED
    assert refused.retry_after_seconds is None


def test_without_a_replica_requests_wait_for_a_grace_and_are_refused_then(admission):
    assert admission.refusal(request(), conditions(absence_seconds=5.0)) is None
    refused = admission.refusal(request(), conditions(absence_seconds=5.1))
    assert refused.reason is Reason.REPLICA_UNAVAILABLE
    assert refused.retry_after_seconds == 5


def test_the_time_of_a_full_lane_is_that_of_a_tenth_of_the_queue(admission, lanes):
    fill(lanes, 100)
    assert admission.refusal(request(), conditions(drain_rate=2.0)).retry_after_seconds == 5


def test_a_retry_time_is_never_below_a_second_and_is_spread_upwards(admission, lanes):
    fill(lanes, 100)
    times = [
        admission.refusal(request(), conditions(drain_rate=1000.0, random_share=share)).retry_after_seconds
        for share in (0.0, 0.5, 1.0)
    ]
    assert times == [1.0, 1.25, 1.5]


def test_headers_are_refused_when_too_many_requests_are_held(admission):
    assert admission.refusal_of_headers(request(deadline_in=None), conditions(held_request_count=200)) is None
    refused = admission.refusal_of_headers(request(deadline_in=None), conditions(held_request_count=201))
    assert refused.reason is Reason.SERVER_IS_OVERLOADED


def test_headers_that_name_a_class_are_refused_when_its_lane_is_full(admission, lanes):
    fill(lanes, 100, ServiceClass.BATCH)
    assert admission.refusal_of_headers(request(), conditions()) is None
    assert admission.refusal_of_headers(request(named_class=ServiceClass.REALTIME), conditions()) is None
    refused = admission.refusal_of_headers(request(named_class=ServiceClass.BATCH), conditions())
    assert refused.message == "The batch queue is full by requests; 100 requests wait in it"


def test_headers_are_refused_without_a_replica_and_after_the_deadline(admission):
    refused = admission.refusal_of_headers(request(), conditions(absence_seconds=6))
    assert refused.reason is Reason.REPLICA_UNAVAILABLE
    refused = admission.refusal_of_headers(request(deadline_in=-1), conditions())
    assert refused.reason is Reason.DEADLINE_EXCEEDED


def test_when_all_lanes_are_full_no_body_is_read(admission, lanes):
    for service_class in (ServiceClass.REALTIME, ServiceClass.STANDARD):
        fill(lanes, 100, service_class)
    assert admission.refusal_of_headers(request(), conditions()) is None
    fill(lanes, 100, ServiceClass.BATCH)
    refused = admission.refusal_of_headers(request(), conditions())
    assert refused.reason is Reason.SERVER_IS_OVERLOADED
    assert refused.message == "All queues are full; 300 requests wait in them"
