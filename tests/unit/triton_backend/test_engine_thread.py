"""The thread between Triton and the engine, with an engine that the test plays."""

from __future__ import annotations

import pytest
from engine_thread import MAX_FAILED_STEP_COUNT, EngineThread, Unavailable

from llm_engine import EngineBroken, RequestRefused


def test_a_sequence_gets_its_tokens_in_order_and_one_end(engine_thread, make_channel, make_sequence):
    channel = make_channel()
    engine_thread.submit(make_sequence(max_tokens=5), channel)
    assert channel.wait_for_ends(1) == {"a": "length"}
    assert [token for output in channel.outputs for token in output.token_ids] == [0, 1, 2, 3, 4]


def test_a_refusal_of_the_engine_comes_as_the_end_of_the_sequence(engine, engine_thread, make_channel, make_sequence):
    engine.max_sequences = 0
    channel = make_channel()
    engine_thread.submit(make_sequence(), channel)
    assert channel.wait_for_ends(1) == {"a": "error"}
    assert channel.outputs[-1].error_reason == "QUEUE_FULL"


def test_an_id_that_is_under_way_is_refused(engine, engine_thread, make_channel, make_sequence):
    engine.step_gate.clear()
    engine_thread.submit(make_sequence(), make_channel())
    with pytest.raises(RequestRefused, match="DUPLICATE_ID"):
        engine_thread.submit(make_sequence(), make_channel())


def test_submitting_does_not_wait_for_a_step_and_the_inbox_is_bounded(
    engine, engine_thread, make_channel, make_sequence, until
):
    engine.step_gate.clear()
    channel = make_channel()
    engine_thread.submit(make_sequence("first"), channel)
    until(lambda: engine.has_work)
    engine_thread.submit(make_sequence("b"), channel)
    engine_thread.submit(make_sequence("c"), channel)
    with pytest.raises(RequestRefused, match="QUEUE_FULL"):
        engine_thread.submit(make_sequence("d"), channel)
    engine.step_gate.set()
    assert set(channel.wait_for_ends(3)) == {"first", "b", "c"}


def test_a_cancelled_sequence_leaves_the_engine_and_ends_as_cancelled(
    engine, engine_thread, make_channel, make_sequence, until
):
    channel = make_channel()
    engine_thread.submit(make_sequence(max_tokens=10**9), channel)
    until(lambda: channel.outputs)
    assert engine_thread.cancel("a")
    assert channel.wait_for_ends(1) == {"a": "cancelled"}
    assert not engine.has_work
    assert not engine_thread.cancel("a")


def test_a_sequence_cancelled_in_the_inbox_never_reaches_the_engine(
    engine, engine_thread, make_channel, make_sequence, until
):
    engine.step_gate.clear()
    channel = make_channel()
    engine_thread.submit(make_sequence("first"), channel)
    until(lambda: engine.has_work)
    engine_thread.submit(make_sequence("second"), channel)
    engine_thread.cancel("second")
    engine.step_gate.set()
    assert channel.wait_for_ends(2) == {"first": "length", "second": "cancelled"}
    assert "second" not in engine.requests


def test_a_client_that_is_lost_has_its_sequences_dropped(engine, engine_thread, make_channel, make_sequence, until):
    lost, other = make_channel(), make_channel()
    lost.gone = True
    engine_thread.submit(make_sequence("lost", max_tokens=10**9), lost)
    engine_thread.submit(make_sequence("other", max_tokens=10**9), other)
    until(lambda: engine.cancelled == ["lost"])
    assert set(engine.sequences) == {"other"}


def test_a_failed_step_ends_its_sequences_and_the_next_ones_run(
    engine, engine_thread, broken, make_channel, make_sequence
):
    engine.step_failures = [ValueError("bad block")]
    channel = make_channel()
    engine_thread.submit(make_sequence("a"), channel)
    channel.wait_for_ends(1)
    assert (channel.outputs[-1].error_reason, "bad block" in channel.outputs[-1].error_message) == (
        "ENGINE_FAILED",
        True,
    )
    engine_thread.submit(make_sequence("b"), channel)
    assert channel.wait_for_ends(2)["b"] == "length"
    assert broken == []


def test_an_engine_that_fails_again_and_again_is_broken(engine, engine_thread, broken, make_channel, make_sequence):
    engine.step_failures = [RuntimeError(f"CUDA error {number}") for number in range(MAX_FAILED_STEP_COUNT)]
    channel = make_channel()
    for number in range(MAX_FAILED_STEP_COUNT):
        engine_thread.submit(make_sequence(str(number)), channel)
        channel.wait_for_ends(number + 1)
    reasons = [output.error_reason for output in channel.outputs]
    assert reasons == ["ENGINE_FAILED"] * (MAX_FAILED_STEP_COUNT - 1) + ["ENGINE_UNAVAILABLE"]
    with pytest.raises(Unavailable, match="CUDA error"):
        engine_thread.submit(make_sequence("later"), channel)
    assert len(broken) == 1


def test_an_engine_that_says_so_is_broken_at_once(engine, engine_thread, broken, make_channel, make_sequence, until):
    engine.step_failures = [EngineBroken("rank 1 is gone")]
    channel = make_channel()
    engine_thread.submit(make_sequence(), channel)
    channel.wait_for_ends(1)
    assert channel.outputs[-1].error_reason == "ENGINE_UNAVAILABLE"
    until(lambda: broken == ["the engine's step failed: rank 1 is gone"])


def test_an_engine_that_cannot_drop_a_sequence_is_broken_at_once(
    engine, engine_thread, broken, make_channel, make_sequence, until
):
    engine.step_failures = [RuntimeError("first")]
    engine.cancel_failure = RuntimeError("second")
    channel = make_channel()
    engine_thread.submit(make_sequence(), channel)
    channel.wait_for_ends(1)
    assert channel.outputs[-1].error_reason == "ENGINE_UNAVAILABLE"
    until(lambda: len(broken) == 1)


def test_closing_ends_every_sequence_as_unavailable(engine, engine_thread, make_channel, make_sequence, until):
    channel = make_channel()
    engine_thread.submit(make_sequence(max_tokens=10**9), channel)
    until(lambda: channel.outputs)
    engine_thread.close(5)
    assert channel.ends() == {"a": "error"}
    assert channel.outputs[-1].error_reason == "ENGINE_UNAVAILABLE"
    with pytest.raises(Unavailable):
        engine_thread.submit(make_sequence("b"), channel)


def test_closing_for_a_reason_says_it(engine, engine_thread, make_channel, make_sequence, until):
    channel = make_channel()
    engine_thread.submit(make_sequence(max_tokens=10**9), channel)
    until(lambda: channel.outputs)
    engine_thread.close(5, "rank 1 has ended")
    assert channel.outputs[-1].error_message == "rank 1 has ended"
    with pytest.raises(Unavailable, match="rank 1 has ended"):
        engine_thread.require_available()


def test_the_engines_own_thread_may_close_it_when_it_is_broken(engine, make_channel, make_sequence, until):
    closed = []

    def close(message: str) -> None:
        thread.close(5, message)
        closed.append(message)

    thread = EngineThread(engine, on_broken=close, log=lambda message: None, stream_interval_seconds=0.0)
    engine.step_failures = [EngineBroken("rank 1 has ended")]
    channel = make_channel()
    thread.submit(make_sequence(), channel)
    until(lambda: closed)
    assert channel.ends() == {"a": "error"}
    assert "rank 1 has ended" in channel.outputs[-1].error_message


def test_steps_go_on_while_a_grammar_is_compiled(engine, engine_thread, make_channel, make_sequence):
    engine.grammar_gate.clear()
    bound, free = make_channel(), make_channel()
    engine_thread.submit(make_sequence("bound", grammar="[a-z]+"), bound)
    engine_thread.submit(make_sequence("free"), free)
    assert free.wait_for_ends(1) == {"free": "length"}
    assert not bound.outputs
    engine.grammar_gate.set()
    assert bound.wait_for_ends(1) == {"bound": "length"}
    assert engine.matchers == {"bound": "matcher of [a-z]+", "free": None}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(RequestRefused("INVALID_VALUE", "no such grammar"), "INVALID_VALUE"), (OSError("no memory"), "ENGINE_FAILED")],
)
def test_a_grammar_that_cannot_be_compiled_ends_its_sequence_alone(
    engine, engine_thread, make_channel, make_sequence, failure, reason
):
    engine.grammar_failures["["] = failure
    channel = make_channel()
    engine_thread.submit(make_sequence("bad", grammar="["), channel)
    engine_thread.submit(make_sequence("good", grammar="a"), channel)
    assert channel.wait_for_ends(2) == {"bad": "error", "good": "length"}
    assert [output.error_reason for output in channel.outputs if output.request_id == "bad"] == [reason]
    assert "bad" not in engine.matchers


def test_what_is_cancelled_while_its_grammar_is_compiled_never_reaches_the_engine(
    engine, engine_thread, make_channel, make_sequence
):
    engine.grammar_gate.clear()
    first, second = make_channel(), make_channel()
    engine_thread.submit(make_sequence(grammar="one"), first)
    assert engine_thread.cancel("a")
    assert first.wait_for_ends(1) == {"a": "cancelled"}
    # Its name may be used again at once.
    engine_thread.submit(make_sequence(grammar="two"), second)
    engine.grammar_gate.set()
    assert second.wait_for_ends(1) == {"a": "length"}
    assert engine.matchers == {"a": "matcher of two"}
    assert len(first.outputs) == 1


def test_what_waits_for_its_grammar_is_bounded_with_the_inbox(engine, engine_thread, make_channel, make_sequence):
    engine.grammar_gate.clear()
    channel = make_channel()
    for name in ("a", "b"):
        engine_thread.submit(make_sequence(name, grammar="x"), channel)
    with pytest.raises(RequestRefused, match="QUEUE_FULL"):
        engine_thread.submit(make_sequence("c", grammar="x"), channel)
    engine.grammar_gate.set()
    assert channel.wait_for_ends(2) == {"a": "length", "b": "length"}


def test_a_step_that_fails_leaves_what_waits_for_its_grammar(engine, engine_thread, make_channel, make_sequence):
    engine.grammar_gate.clear()
    engine.step_failures = [ValueError("once")]
    bound, free = make_channel(), make_channel()
    engine_thread.submit(make_sequence("bound", grammar="x"), bound)
    engine_thread.submit(make_sequence("free"), free)
    assert free.wait_for_ends(1) == {"free": "error"}
    engine.grammar_gate.set()
    assert bound.wait_for_ends(1) == {"bound": "length"}


def test_closing_ends_what_waits_for_its_grammar(engine, engine_thread, make_channel, make_sequence):
    engine.grammar_gate.clear()
    channel = make_channel()
    engine_thread.submit(make_sequence(grammar="x"), channel)
    engine_thread.close(0.5)
    assert channel.ends() == {"a": "error"}
    assert channel.outputs[-1].error_reason == "ENGINE_UNAVAILABLE"
