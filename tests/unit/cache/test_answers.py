"""Which answers are stored, and what a replayed one says."""

from __future__ import annotations

import pytest

from tidegate.cache.answers import answer_id, replay_events, why_not_kept
from tidegate.common.errors import Reason, TidegateError
from tidegate.model.records import AnswerCollector
from tidegate.v1 import cache_pb2, inference_pb2


def finished_answer(reason: int = inference_pb2.FINISH_REASON_STOP) -> cache_pb2.Answer:
    answer = cache_pb2.Answer(model="m")
    answer.deltas.add(text="Par", token_ids=[1, 2])
    answer.deltas.add(text="is", token_ids=[3])
    answer.finished.reason = inference_pb2.FinishReason.ValueType(reason)
    answer.finished.usage.prompt_token_count = 7
    answer.finished.usage.completion_token_count = 4
    answer.finished.time_to_first_token.FromMilliseconds(900)
    return answer


@pytest.mark.parametrize("reason", [inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH])
def test_a_complete_answer_is_kept(reason: int) -> None:
    assert why_not_kept(finished_answer(reason), largest_answer_bytes=1000, enabled=True) == ""


@pytest.mark.parametrize("reason", [inference_pb2.FINISH_REASON_ERROR, inference_pb2.FINISH_REASON_UNSPECIFIED, 77])
def test_an_answer_that_did_not_end_well_is_not_kept(reason: int) -> None:
    assert why_not_kept(finished_answer(reason), largest_answer_bytes=1000, enabled=True) == "NOT_COMPLETE"


def test_an_answer_without_an_end_is_not_kept() -> None:
    answer = finished_answer()
    answer.ClearField("finished")
    assert why_not_kept(answer, largest_answer_bytes=1000, enabled=True) == "NOT_COMPLETE"


def test_an_answer_above_the_bound_is_not_kept() -> None:
    answer = finished_answer()
    size = answer.ByteSize()
    assert why_not_kept(answer, largest_answer_bytes=size, enabled=True) == ""
    assert why_not_kept(answer, largest_answer_bytes=size - 1, enabled=True) == "TOO_LARGE"


def test_nothing_is_kept_when_the_cache_is_off() -> None:
    assert why_not_kept(finished_answer(), largest_answer_bytes=1000, enabled=False) == "DISABLED"


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(TidegateError) as caught:
        answer_id(bytes(size), "a")
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_VALUE, "answer_key")


def test_an_absent_tenant_is_the_default_one() -> None:
    assert answer_id(bytes(32), "") == answer_id(bytes(32), "default")


def test_what_the_model_service_records_says_how_much_of_the_prompt_was_left_out() -> None:
    collector = AnswerCollector(bytes(32), "a")
    started = inference_pb2.Started(model="m", prompt_token_count=7, truncated_token_count=12)
    finished = inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_STOP)
    assert collector.add(inference_pb2.GenerateEvent(started=started)) is None
    record = collector.add(inference_pb2.GenerateEvent(finished=finished))
    assert record is not None
    assert record.answer.truncated_token_count == 12


def test_a_replay_says_how_much_of_the_prompt_was_left_out() -> None:
    answer = finished_answer()
    answer.truncated_token_count = 12
    started = next(replay_events(answer, "new", elapsed_seconds=0.0)).started
    assert started.truncated_token_count == 12


def test_a_replay_is_the_recorded_answer_under_the_new_id() -> None:
    answer = finished_answer()
    events = list(replay_events(answer, "new", elapsed_seconds=0.002))
    assert [event.request_id for event in events] == ["new"] * 4
    assert events[0].started == inference_pb2.Started(model="m", prompt_token_count=7, cached=True)
    assert [event.delta for event in events[1:3]] == list(answer.deltas)
    finished = events[3].finished
    assert finished.reason == inference_pb2.FINISH_REASON_STOP
    assert finished.usage == inference_pb2.Usage(prompt_token_count=7, completion_token_count=4, cached_token_count=7)
    assert finished.time_to_first_token.ToMilliseconds() == 2
    assert answer == finished_answer()
