"""What a stored answer is: which answers may be stored, and how one is told again. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tidegate.cache.memory import AnswerId
from tidegate.common.errors import Reason, TidegateError
from tidegate.common.headers import DEFAULT_TENANT
from tidegate.v1 import cache_pb2, inference_pb2

ANSWER_KEY_BYTES: Final = 32

NOT_COMPLETE: Final = "NOT_COMPLETE"
TOO_LARGE: Final = "TOO_LARGE"
DISABLED: Final = "DISABLED"
FULL: Final = "FULL"
"""Everything in memory is held for replays that are under way."""

_COMPLETE: Final = frozenset({inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH})


def answer_id(answer_key: bytes, tenant: str) -> AnswerId:
    """The name of a tenant's answer; raises INVALID_VALUE for a key that is none."""
    if len(answer_key) != ANSWER_KEY_BYTES:
        message = f"answer_key must have {ANSWER_KEY_BYTES} bytes, it has {len(answer_key)}"
        raise TidegateError(Reason.INVALID_VALUE, message, field="answer_key")
    return AnswerId(tenant or DEFAULT_TENANT, bytes(answer_key))


def why_not_kept(answer: cache_pb2.Answer, *, largest_answer_bytes: int, enabled: bool) -> str:
    """Why an answer is not stored, as RecordResponse says it; empty when it is."""
    if not enabled:
        return DISABLED
    if not answer.HasField("finished") or answer.finished.reason not in _COMPLETE or answer.finished.HasField("error"):
        return NOT_COMPLETE
    return TOO_LARGE if answer.ByteSize() > largest_answer_bytes else ""


def replay_events(
    answer: cache_pb2.Answer, request_id: str, *, elapsed_seconds: float
) -> Iterator[inference_pb2.GenerateEvent]:
    """The events of a stored answer under a new request's id.

    The counts are the recorded ones; of the prompt, everything was reused.

    Args:
        elapsed_seconds: from the request's arrival to now, which is when its first token leaves.
    """
    usage = answer.finished.usage
    started = inference_pb2.Started(
        model=answer.model,
        prompt_token_count=usage.prompt_token_count,
        truncated_token_count=answer.truncated_token_count,
        cached=True,
    )
    yield inference_pb2.GenerateEvent(request_id=request_id, started=started)
    for delta in answer.deltas:
        yield inference_pb2.GenerateEvent(request_id=request_id, delta=delta)
    finished = inference_pb2.Finished(reason=answer.finished.reason, usage=usage)
    finished.usage.cached_token_count = usage.prompt_token_count
    finished.time_to_first_token.FromMicroseconds(round(elapsed_seconds * 1_000_000))
    yield inference_pb2.GenerateEvent(request_id=request_id, finished=finished)
