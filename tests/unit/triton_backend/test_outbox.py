"""Outputs on their way from the engine's thread to slow clients."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from functools import partial

import outbox as module
import pytest
from outbox import Outbox, merged

from llm_engine import SequenceOutput


class GatedChannel:
    """A client that takes nothing until its gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.sent: list[list[SequenceOutput]] = []
        self.entered = threading.Event()

    def send(self, outputs, load) -> None:
        self.entered.set()
        assert self.gate.wait(5)
        self.sent.append(outputs)

    def is_cancelled(self) -> bool:
        return False


class RecordingChannel:
    """A client that takes everything at once."""

    def __init__(self) -> None:
        self.sent: list[list[tuple[str, list[int], str]]] = []

    def send(self, outputs, load) -> None:
        self.sent.append([(part.request_id, part.token_ids, part.finish_reason) for part in outputs])

    def has_got(self, token: int) -> bool:
        return any(token in tokens for message in self.sent for _, tokens, _ in message)

    def is_cancelled(self) -> bool:
        return False


@pytest.fixture
def make_outbox() -> Iterator:
    made = []

    def make(max_interval_seconds: float, on_lost=lambda channel, error: None) -> Outbox:
        made.append(Outbox(on_lost, max_interval_seconds))
        return made[-1]

    yield make
    for outbox in made:
        outbox.close(5)


@pytest.fixture
def outbox(make_outbox) -> Outbox:
    return make_outbox(0.0)


@pytest.fixture
def long_waits(monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS_PER_OUTPUT", 60.0)


def output(name: str, *tokens: int, finish_reason: str = "") -> SequenceOutput:
    return SequenceOutput(request_id=name, token_ids=list(tokens), finish_reason=finish_reason)


def test_a_slow_client_gets_one_merged_output_a_sequence(outbox, engine):
    channel = GatedChannel()
    outbox.post([(channel, output("a", 1))], engine.load)
    assert channel.entered.wait(5)
    for token in range(2, 100):
        outbox.post([(channel, output("a", token)), (channel, output("b", -token))], engine.load)
    outbox.post([(channel, output("a", finish_reason="stop"))], engine.load)
    channel.gate.set()
    outbox.close(5)
    first, second = channel.sent
    assert [part.token_ids for part in first] == [[1]]
    assert [(part.request_id, part.token_ids, part.finish_reason) for part in second] == [
        ("a", list(range(2, 100)), "stop"),
        ("b", [-token for token in range(2, 100)], ""),
    ]


def test_outputs_gather_but_a_sequences_first_and_last_leave_at_once(make_outbox, engine, until, long_waits):
    outbox, channel = make_outbox(60.0), RecordingChannel()
    outbox.post([(channel, output("a", 1)), (channel, output("b", 11))], engine.load)
    until(lambda: len(channel.sent) == 1)
    outbox.post([(channel, output("c", 21))], engine.load)
    until(lambda: len(channel.sent) == 2)
    outbox.post([(channel, output("a", 2)), (channel, output("b", 12))], engine.load)
    outbox.post([(channel, output("a", 3)), (channel, output("b", 13, finish_reason="stop"))], engine.load)
    until(lambda: len(channel.sent) == 3)
    outbox.post([(channel, output("a", 4, finish_reason="length"))], engine.load)
    until(lambda: len(channel.sent) == 4)
    assert channel.sent == [
        [("a", [1], ""), ("b", [11], "")],
        [("c", [21], "")],
        [("b", [12, 13], "stop")],
        [("a", [2, 3, 4], "length")],
    ]


def test_a_client_with_something_urgent_leaves_another_ones_outputs_waiting(make_outbox, engine, until, long_waits):
    outbox, one, other = make_outbox(60.0), RecordingChannel(), RecordingChannel()
    outbox.post([(one, output("a", 1)), (other, output("b", 11))], engine.load)
    until(lambda: one.sent and other.sent)
    outbox.post([(one, output("a", 2)), (other, output("b", 12, finish_reason="stop"))], engine.load)
    until(lambda: len(other.sent) == 2)
    assert one.sent == [[("a", [1], "")]]
    outbox.close(5)
    assert one.sent == [[("a", [1], "")], [("a", [2], "")]]


def test_what_gathers_leaves_after_the_longest_time(make_outbox, engine, until, long_waits):
    outbox, channel = make_outbox(0.02), RecordingChannel()
    for token in (1, 2, 3):
        outbox.post([(channel, output("a", token))], engine.load)
        until(partial(channel.has_got, token))


def test_few_sequences_wait_for_less_than_the_longest_time(make_outbox, engine, until):
    outbox, channel = make_outbox(60.0), RecordingChannel()
    for token in (1, 2, 3):
        outbox.post([(channel, output("a", token))], engine.load)
        until(partial(channel.has_got, token))


def test_the_more_outputs_leave_the_longer_the_next_ones_gather(make_outbox, engine, until, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_PER_OUTPUT", 0.01)
    outbox, channel = make_outbox(60.0), RecordingChannel()
    outbox.post([(channel, output(str(number), 0)) for number in range(6000)], engine.load)
    until(lambda: len(channel.sent) == 1)
    outbox.post([(channel, output("1", 1))], engine.load)
    time.sleep(0.05)
    outbox.post([(channel, output("2", 1, finish_reason="stop"))], engine.load)
    until(lambda: len(channel.sent) == 2)
    assert channel.sent[1] == [("2", [1], "stop")]


def test_a_sequence_of_the_same_name_begins_anew(make_outbox, engine, until, long_waits):
    outbox, channel = make_outbox(60.0), RecordingChannel()
    outbox.post([(channel, output("a", 1))], engine.load)
    until(lambda: len(channel.sent) == 1)
    outbox.post([(channel, output("a", 2, finish_reason="stop"))], engine.load)
    until(lambda: len(channel.sent) == 2)
    outbox.post([(channel, output("a", 3))], engine.load)
    until(lambda: len(channel.sent) == 3)


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_a_failure_comes_after_what_everybody_has_got(make_outbox, engine, until, long_waits, reason):
    outbox, channel = make_outbox(60.0), RecordingChannel()
    outbox.post([(channel, output("a", 1)), (channel, output("b", 11))], engine.load)
    until(lambda: len(channel.sent) == 1)
    for token in (2, 3):
        outbox.post([(channel, output("a", token)), (channel, output("b", 10 + token))], engine.load)
    outbox.post([(channel, output(name, finish_reason=reason)) for name in ("a", "b")], engine.load)
    until(lambda: len(channel.sent) == 2)
    assert channel.sent[1] == [("a", [2, 3], ""), ("b", [12, 13], ""), ("a", [], reason), ("b", [], reason)]


def test_how_many_run_and_wait_is_told_at_once(make_outbox, engine, until, long_waits):
    outbox, channel = make_outbox(60.0), RecordingChannel()
    outbox.post([(channel, output("a", 1))], engine.load)
    until(lambda: len(channel.sent) == 1)
    for token, (running, waiting) in enumerate([(0, 1), (1, 1), (1, 0)], start=2):
        load = dataclasses.replace(engine.load, running=running, waiting=waiting)
        outbox.post([(channel, output("a", token))], load)
        until(partial(channel.has_got, token))


def test_what_was_posted_before_closing_is_sent(outbox, engine, make_channel):
    channel = make_channel()
    outbox.post([(channel, output("a", 1, finish_reason="length"))], engine.load)
    outbox.close(5)
    assert channel.ends() == {"a": "length"}


def test_a_client_that_raises_is_told_of_and_harms_no_other(make_outbox, engine, make_channel):
    lost = []
    outbox = make_outbox(0.0, lambda channel, error: lost.append((channel, str(error))))
    bad, good = make_channel(), make_channel()
    bad.gone = True
    outbox.post([(bad, output("a", 1)), (good, output("b", 2, finish_reason="length"))], engine.load)
    outbox.close(5)
    assert lost == [(bad, "the stream is closed")]
    assert good.ends() == {"b": "length"}


def test_merging_keeps_log_probabilities_beside_their_tokens():
    first = SequenceOutput(
        request_id="a", token_ids=[1], logprobs=[-0.1], top_token_ids=[[1, 2]], top_logprobs=[[-0.1, -3.0]]
    )
    last = SequenceOutput(
        request_id="a", token_ids=[], logprobs=[], top_token_ids=[], top_logprobs=[], finish_reason="stop"
    )
    both = merged(first, last)
    assert (both.token_ids, both.logprobs, both.top_token_ids) == ([1], [-0.1], [[1, 2]])
    assert both.finish_reason == "stop"
