"""What is said at the end of a request, in one place: the log line, the metrics, the outcome to the scheduler."""

from __future__ import annotations

from typing import Final

import structlog

from tidegate.common.errors import Reason, TidegateError
from tidegate.model.call import Record
from tidegate.model.credits import Spent
from tidegate.model.load import ReplicaLoad
from tidegate.model.metrics import OUTCOME_WORDS, Metrics
from tidegate.model.slots import Slots
from tidegate.v1 import replica_pb2

log = structlog.get_logger()

_OUTCOMES: Final = {
    Reason.CANCELLED.name: replica_pb2.REQUEST_OUTCOME_CANCELLED,
    Reason.DEADLINE_EXCEEDED.name: replica_pb2.REQUEST_OUTCOME_DEADLINE_EXCEEDED,
    Reason.INTERNAL_ERROR.name: replica_pb2.REQUEST_OUTCOME_FAILED,
    Reason.NUMERICAL_ERROR.name: replica_pb2.REQUEST_OUTCOME_FAILED,
}


def outcome_of_refusal(error: TidegateError) -> replica_pb2.RequestOutcome.ValueType:
    """How a request ended that got no event."""
    return _OUTCOMES.get(error.reason.name, replica_pb2.REQUEST_OUTCOME_REFUSED)


def outcome_of_finish(record: Record) -> replica_pb2.RequestOutcome.ValueType:
    """How a request ended whose last event was delivered."""
    if not record.reason:
        return replica_pb2.REQUEST_OUTCOME_COMPLETED
    return _OUTCOMES.get(record.reason, replica_pb2.REQUEST_OUTCOME_FAILED)


class Reports:
    """Says how requests went."""

    def __init__(self, metrics: Metrics, load: ReplicaLoad, slots: Slots) -> None:
        self._metrics = metrics
        self._load = load
        self._slots = slots

    def add_tokens(self, count: int, gap_seconds: float | None) -> None:
        """Counts tokens as they come."""
        self._load.add_tokens(count, gap_seconds)
        self._metrics.add_tokens(count, gap_seconds)

    def add_first_token(self, seconds: float) -> None:
        """Counts a first token."""
        self._load.add_first_token(seconds)

    def end(self, record: Record, spent: Spent | None) -> None:
        """Reports a request whose record is complete."""
        self._metrics.add_request(record)
        is_paused = spent is not None and spent.was_paused
        if (
            record.ended_at is not None
            and record.slot_at is not None
            and record.first_token_at is None
            and not is_paused
        ):
            self._load.add_silence(record.ended_at - record.arrived_at)
        self._load.add_request(failed=record.outcome == replica_pb2.REQUEST_OUTCOME_FAILED)
        if record.outcome == replica_pb2.REQUEST_OUTCOME_COMPLETED:
            self._load.add_need(record.prompt_token_count + record.completion_token_count)
        self._slots.report(record.credit_id, spent, outcome_message(record))
        log.info("request", **log_fields(record))


def outcome_message(record: Record) -> replica_pb2.Outcome:
    """The record as the scheduler is told of it."""
    outcome = replica_pb2.Outcome(
        request_id=record.request_id,
        outcome=record.outcome,
        prompt_token_count=record.prompt_token_count,
        cached_token_count=record.cached_token_count,
        completion_token_count=record.completion_token_count,
    )
    if record.time_to_first_token_seconds is not None:
        outcome.time_to_first_token.FromNanoseconds(int(record.time_to_first_token_seconds * 1e9))
    if record.ended_at is not None:
        outcome.duration.FromNanoseconds(int((record.ended_at - record.arrived_at) * 1e9))
    return outcome


def log_fields(record: Record) -> dict[str, object]:
    """The record as the one log line of a request has it; times in milliseconds, from stage to stage."""
    named = {"client_request_id": record.client_request_id} if record.client_request_id else {}
    return {
        "request_id": record.request_id,
        **named,
        "operation": record.operation,
        "tenant": record.tenant,
        "service_class": record.service_class,
        "outcome": OUTCOME_WORDS[record.outcome],
        "reason": record.reason,
        "finish_reason": record.finish_reason,
        "queue_ms": round(record.queue_seconds * 1000, 1),
        "prepare_ms": _milliseconds(record.arrived_at, record.prepared_at),
        "wait_slot_ms": _milliseconds(record.prepared_at, record.slot_at),
        "ttft_ms": _milliseconds(record.arrived_at, record.first_token_at),
        "total_ms": _milliseconds(record.arrived_at, record.ended_at),
        "prompt_token_count": record.prompt_token_count,
        "cached_token_count": record.cached_token_count,
        "completion_token_count": record.completion_token_count,
        "resumed_count": record.resumed_count,
    }


def _milliseconds(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round((end - begin) * 1000, 1)
