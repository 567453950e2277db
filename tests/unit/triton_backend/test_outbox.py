"""Outputs on their way from the engine's thread to slow clients."""

from __future__ import annotations

import threading

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


@pytest.fixture
def outbox():
    outbox = Outbox(lambda channel, error: None)
    yield outbox
    outbox.close(5)


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


def test_what_was_posted_before_closing_is_sent(outbox, engine, make_channel):
    channel = make_channel()
    outbox.post([(channel, output("a", 1, finish_reason="length"))], engine.load)
    outbox.close(5)
    assert channel.ends() == {"a": "length"}


def test_a_client_that_raises_is_told_of_and_harms_no_other(engine, make_channel):
    lost = []
    outbox = Outbox(lambda channel, error: lost.append((channel, str(error))))
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
