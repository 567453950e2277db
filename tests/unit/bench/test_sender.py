"""What the sender does to a server and what it writes down, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.bench.arrivals import Closed, Constant
from tidegate.bench.columns import columns_of
from tidegate.bench.flows import Flow
from tidegate.bench.ledger import Ending, Outcome
from tidegate.bench.lengths import ConstantLength
from tidegate.bench.sender import Share

TEN_A_SECOND = Flow(name="ten", arrivals=Constant(10), duration_seconds=2, deadline_seconds=1)


def outcomes(records):
    return [record.outcome for record in records]


def test_requests_go_out_when_planned_and_are_in_time(sent, answer_at_once):
    records = sent([TEN_A_SECOND], answer_at_once)
    assert [record.planned for record in records] == pytest.approx([each / 10 for each in range(20)])
    assert all(record.attempts[0].sent == pytest.approx(record.planned) for record in records)
    assert set(outcomes(records)) == {Outcome.IN_TIME}


def test_a_server_that_stalls_does_not_slow_the_plan_and_its_latency_counts_from_the_planned_time(sent, answer_at_once):
    async def stalls_until_1_5(ask, answer, now):
        await asyncio.sleep(max(0.0, 1.5 - now()))
        await answer_at_once(ask, answer, now)

    records = sent([Flow(name="x", arrivals=Constant(10), duration_seconds=2, deadline_seconds=5)], stalls_until_1_5)
    latencies = [record.attempts[0].last_token - record.planned for record in records]
    assert [record.attempts[0].sent for record in records] == pytest.approx([each / 10 for each in range(20)])
    assert latencies == pytest.approx([max(0.0, 1.5 - each / 10) for each in range(20)])


def test_a_generator_that_stalls_is_blamed_in_lag_and_in_latency(sent, answer_at_once):
    """Half a second in which nothing runs here (the loop's time jumps): what was due then is late by its own time."""

    records = sent([TEN_A_SECOND], answer_at_once, stalls={5: 0.5})
    lags = [record.attempts[0].sent - record.planned for record in records]
    assert lags[6:10] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert lags[11:] == pytest.approx([0] * 9)
    latencies = [record.attempts[0].last_token - record.planned for record in records]
    assert latencies[6:10] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_an_answer_after_the_deadline_is_late_only_for_a_client_that_waited(sent, answer_at_once):
    async def slow(ask, answer, now):
        await asyncio.sleep(1.2)
        await answer_at_once(ask, answer, now)

    patient = Flow(name="p", arrivals=Constant(1), duration_seconds=1, deadline_seconds=1, patience_seconds=3)
    strict = Flow(name="s", arrivals=Constant(1), duration_seconds=1, deadline_seconds=0.9)
    assert outcomes(sent([patient, strict], slow)) == [Outcome.LATE, Outcome.DEADLINE_EXCEEDED]


def test_every_client_that_means_to_leave_does_so_at_its_moment(sent):
    async def never(ask, answer, now):
        await asyncio.sleep(1000)

    records = sent(
        [Flow(name="x", arrivals=Constant(10), duration_seconds=3, deadline_seconds=5, leave_share=1)], never
    )
    assert set(outcomes(records)) == {Outcome.LEFT}
    stays = [record.attempts[0].ended - record.planned for record in records]
    assert len({round(stay, 6) for stay in stays}) == 30
    assert all(0 < stay < 5 for stay in stays)


def test_a_naive_client_knocks_four_times_and_every_attempt_is_written_down(sent):
    async def refuses(ask, answer, now):
        await asyncio.sleep(0.01)
        answer.refuse("SERVER_IS_OVERLOADED", 2.0, "full")

    (record,) = sent(
        [Flow(name="x", arrivals=Constant(1), duration_seconds=1, deadline_seconds=1, retries="naive")], refuses
    )
    assert record.outcome is Outcome.REFUSED
    assert [(each.ending, each.reason, each.retry_after_seconds) for each in record.attempts] == [
        (Ending.REFUSED, "SERVER_IS_OVERLOADED", 2.0)
    ] * 4


def test_an_obedient_client_comes_back_when_told_and_its_latency_still_counts_from_the_plan(sent, answer_at_once):
    async def once_refused(ask, answer, now):
        if now() < 2:
            answer.refuse("SERVER_IS_OVERLOADED", 2.5, "full")
        else:
            await answer_at_once(ask, answer, now)

    (record,) = sent(
        [Flow(name="x", arrivals=Constant(1), duration_seconds=1, deadline_seconds=5, retries="obedient")], once_refused
    )
    assert record.outcome is Outcome.IN_TIME
    assert [each.sent for each in record.attempts] == pytest.approx([0, 2.5])
    assert record.attempts[-1].last_token - record.planned == pytest.approx(2.5)


def test_users_of_a_closed_loop_have_one_request_each_at_a_time(sent, answer_at_once):
    under_way = most = 0

    async def a_moment(ask, answer, now):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.21)
        under_way -= 1
        await answer_at_once(ask, answer, now)

    records = sent([Flow(name="x", arrivals=Closed(users=3), duration_seconds=2)], a_moment)
    assert most == 3
    assert len(records) == 30
    assert len({record.number for record in records}) == 30


def test_workers_share_a_plan_without_overlap(sent, answer_at_once):
    parts = [sent([TEN_A_SECOND], answer_at_once, share=Share(index, 3)) for index in range(3)]
    numbers = sorted(record.number for part in parts for record in part)
    assert numbers == list(range(20))


class Checker:
    """Promises letters: as many as a chat's prompt is long, or the first of the prompt's tokens says, from `a` on."""

    def expected_tokens(self, prompt_token_ids, count):
        return [(prompt_token_ids[0] + place) % 26 for place in range(count)]

    def text_of(self, token_ids):
        return "".join(chr(ord("a") + token_id) for token_id in token_ids)

    def chat_token_ids(self, text):
        return [len(text)]


EIGHT_TOKENS = Flow(name="x", arrivals=Constant(4), duration_seconds=1, answer_tokens=ConstantLength(8))


def test_tokens_and_text_that_are_not_what_the_engine_promises_are_wrong_text(sent, answer_at_once):
    async def right_or_wrong(ask, answer, now):
        await answer_at_once(ask, answer, now)
        answer.token_ids = Checker().expected_tokens(ask.prompt.tolist(), ask.max_tokens)
        answer.texts = [Checker().text_of(answer.token_ids[:5]), Checker().text_of(answer.token_ids[5:])]
        if ask.number == 1:
            answer.token_ids[3] += 1
        elif ask.number == 2:
            answer.texts[1] = "?" + answer.texts[1][1:]
        elif ask.number == 3:
            answer.texts.append("z")

    records = sent([EIGHT_TOKENS], right_or_wrong, checker=Checker())
    assert outcomes(records) == [Outcome.IN_TIME, Outcome.WRONG_TEXT, Outcome.WRONG_TEXT, Outcome.WRONG_TEXT]
    assert [record.last.what for record in records[1:]] == [
        "token 3 of 8 is not what the engine promises",
        "the text is not what the engine promises from character 5 on",
        "the text is not what the engine promises from character 8 on",
    ]


def test_a_chats_text_is_compared_as_far_as_the_usage_says_and_without_one_to_the_asked_length(sent):
    async def answers(ask, answer, now):
        usages = [8, 5, None, None]
        promised = Checker().text_of(Checker().expected_tokens([len(ask.prompt)], 8))
        answer.texts = list(promised[:5] if ask.number in (1, 3) else promised)
        answer.first_token = answer.last_token = now()
        answer.token_count = len(answer.texts)
        answer.complete(usages[ask.number])

    records = sent([EIGHT_TOKENS], answers, checker=Checker(), wants_text=True)
    assert outcomes(records) == [Outcome.IN_TIME, Outcome.IN_TIME, Outcome.IN_TIME, Outcome.WRONG_TEXT]


def test_a_refusal_takes_as_long_as_since_it_was_to_be_sent(sent):
    """The generator stalls at 0.9 s for 0.5 s, in which the second attempt of the first request is due."""

    async def refuses(ask, answer, now):
        await asyncio.sleep(0.01)
        answer.refuse("SERVER_IS_OVERLOADED", 1.0, "full")

    patient = Flow(name="p", arrivals=Constant(1), duration_seconds=1, deadline_seconds=2, retries="obedient")
    stalled = Flow(name="s", arrivals=Constant(1), begin_seconds=0.9, duration_seconds=1, deadline_seconds=2)
    late = Flow(name="l", arrivals=Constant(1), begin_seconds=1.1, duration_seconds=1, deadline_seconds=2)
    records = sent([patient, stalled, late], refuses, stalls={1: 0.5})
    assert [each.due for each in records[0].attempts] == pytest.approx([0, 1.01])
    assert columns_of(records).refusal_seconds == pytest.approx([0.4, 0.51, 0.31], abs=1e-6)


def test_a_generator_that_comes_too_late_says_that_it_did_not_send(sent, answer_at_once):
    records = sent([TEN_A_SECOND], answer_at_once, stalls={0: 1.45})
    assert outcomes(records)[1:5] == [Outcome.NOT_SENT] * 4
    assert records[1].attempts == []
    assert outcomes(records)[5:] == [Outcome.IN_TIME] * 15
