"""The ledger beside the server's counts: what agrees, what cannot be known, and what does not agree."""

from __future__ import annotations

from tidegate.bench.agreement import compare
from tidegate.bench.ledger import Attempt, Ending, Record
from tidegate.bench.watching import ServerCounts, difference, model_counts


def records(*attempts: Attempt) -> list[Record]:
    return [
        Record(number=number, flow="f", tenant="t", service_class="standard", planned=0, deadline_seconds=1,
               prompt_tokens=1, asked_tokens=1, attempts=[attempt])
        for number, attempt in enumerate(attempts)
    ]  # fmt: skip


def ended(ending: Ending, *, heard: bool = False, reason: str = "") -> Attempt:
    return Attempt(due=0, sent=0, ended=1, ending=ending, accepted=0.5 if heard else None, reason=reason)


COMPLETED = ended(Ending.COMPLETED, heard=True)
REFUSED = ended(Ending.REFUSED, reason="SERVER_IS_OVERLOADED")


def agreeing(rows) -> dict[str, bool]:
    return {row.name: row.agrees for row in rows}


def test_counts_that_are_the_same_agree():
    server = ServerCounts(received=5, dispatched=3, refused={"SERVER_IS_OVERLOADED": 2}, model={"completed": 3})
    rows = compare(records(COMPLETED, COMPLETED, COMPLETED, REFUSED, REFUSED), server)
    assert all(agreeing(rows).values())
    assert {row.name for row in rows if row.client_low == row.client_high} >= {"refused SERVER_IS_OVERLOADED"}


def test_a_count_that_differs_is_named():
    server = ServerCounts(received=3, dispatched=3, refused={"SERVER_IS_OVERLOADED": 1}, model={"completed": 2})
    rows = agreeing(compare(records(COMPLETED, COMPLETED, COMPLETED, REFUSED), server))
    assert not rows["requests that reached the scheduler"]
    assert not rows["answers completed by the replicas"]
    assert rows["sent to a replica or to the cache"]


def test_only_clients_that_heard_nothing_make_a_range():
    left_unheard, left_heard = ended(Ending.LEFT), ended(Ending.LEFT, heard=True)
    for server in (
        ServerCounts(received=2, dispatched=2, abandoned=0),
        ServerCounts(received=2, dispatched=1, abandoned=1),
    ):
        assert all(agreeing(compare(records(left_unheard, left_heard), server)).values())
    rows = agreeing(compare(records(left_heard, left_heard), ServerCounts(received=2, dispatched=1, abandoned=1)))
    assert not rows["sent to a replica or to the cache"]
    assert not rows["left while they waited"]


def test_what_envoy_refuses_never_reached_the_scheduler():
    limited = ended(Ending.REFUSED, reason="RATE_LIMIT_EXCEEDED")
    assert all(agreeing(compare(records(limited, COMPLETED), ServerCounts(received=1, dispatched=1))).values())


def test_what_a_replica_refuses_was_dispatched_before():
    server = ServerCounts(received=1, dispatched=1, model={"refused": 1, "refused/SERVER_IS_OVERLOADED": 1})
    assert all(agreeing(compare(records(REFUSED), server)).values())


def test_the_servers_counts_are_the_difference_of_two_readings():
    before = ServerCounts(received=10, dispatched=7, refused={"A": 2}, model={"completed": 7})
    after = ServerCounts(received=15, dispatched=9, refused={"A": 3, "B": 2}, model={"completed": 9, "cancelled": 1})
    assert difference(before, after) == ServerCounts(
        received=5, dispatched=2, refused={"A": 1, "B": 2}, model={"completed": 2, "cancelled": 1}
    )


def test_a_model_services_page_is_read_by_outcome_and_by_reason_of_refusal():
    page = (
        "# HELP tidegate_requests_total Requests that ended, by outcome and reason.\n"
        'tidegate_requests_total{outcome="completed",reason=""} 41.0\n'
        'tidegate_requests_total{outcome="refused",reason="SERVER_IS_OVERLOADED"} 2.0\n'
        'tidegate_requests_created{outcome="completed",reason=""} 1.7e+09\n'
    )
    assert model_counts(page) == {"completed": 41, "refused": 2, "refused/SERVER_IS_OVERLOADED": 2}
