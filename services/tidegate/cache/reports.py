"""What is said at the end of a replay, in one place: the log line and the metrics.

The field names, the operations and the words of the outcome are the model service's, so that one query finds every
request, whoever answered it.
"""

from __future__ import annotations

from typing import Final

import msgspec
import structlog

from tidegate.cache.metrics import CacheMetrics
from tidegate.common.errors import Reason
from tidegate.v1 import cache_pb2, inference_pb2

log = structlog.get_logger()

COMPLETED: Final = "completed"
CANCELLED: Final = "cancelled"
REFUSED: Final = "refused"
FAILED: Final = "failed"

FINISH_REASON_WORDS: Final = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}
"""Only complete answers are stored."""


class Replay(msgspec.Struct, kw_only=True, eq=False):
    """How one replay went; seconds are of the service's monotonic clock."""

    operation: str
    """chat, text_completion or generate_content, as OpenTelemetry has it."""
    request_id: str
    """The request's id in the mesh."""
    tenant: str
    service_class: str
    queue_seconds: float
    arrived_at: float
    client_request_id: str = ""
    first_token_at: float | None = None
    ended_at: float | None = None
    model: str = ""
    prompt_token_count: int = 0
    completion_token_count: int = 0
    finish_reason: str = ""
    outcome: str = CANCELLED
    """A reader that goes away says nothing more, so a replay is that until it has ended otherwise."""
    reason: str = Reason.CANCELLED.name
    """The reason word of an error; empty for none."""

    def begin(self, answer: cache_pb2.Answer, now: float) -> None:
        """Notes what is replayed; its first token leaves now."""
        self.model = answer.model
        self.prompt_token_count = answer.finished.usage.prompt_token_count
        self.completion_token_count = answer.finished.usage.completion_token_count
        self.finish_reason = FINISH_REASON_WORDS.get(answer.finished.reason, "")
        self.first_token_at = now

    def end(self, outcome: str, reason: str = "") -> None:
        """Notes how it ended."""
        self.outcome, self.reason = outcome, reason


def report(replay: Replay, metrics: CacheMetrics) -> None:
    """Reports a request that the cache answered, or refused; its record is complete."""
    assert replay.ended_at is not None
    metrics.add_request(
        operation=replay.operation,
        model=replay.model,
        error_type=replay.reason.lower(),
        duration_seconds=replay.ended_at - replay.arrived_at + replay.queue_seconds,
        prompt_token_count=replay.prompt_token_count,
        completion_token_count=replay.completion_token_count,
    )
    log.info("request", **log_fields(replay))


def log_fields(replay: Replay) -> dict[str, object]:
    """The record as the one log line of a request has it; times in milliseconds."""
    named = {"client_request_id": replay.client_request_id} if replay.client_request_id else {}
    return {
        "request_id": replay.request_id,
        **named,
        "operation": replay.operation,
        "tenant": replay.tenant,
        "service_class": replay.service_class,
        "outcome": replay.outcome,
        "reason": replay.reason,
        "finish_reason": replay.finish_reason,
        "cached": True,
        "queue_ms": round(replay.queue_seconds * 1000, 1),
        "ttft_ms": _milliseconds(replay.arrived_at, replay.first_token_at),
        "total_ms": _milliseconds(replay.arrived_at, replay.ended_at),
        "prompt_token_count": replay.prompt_token_count,
        "completion_token_count": replay.completion_token_count,
    }


def _milliseconds(begin: float, end: float | None) -> float | None:
    return None if end is None else round((end - begin) * 1000, 1)
