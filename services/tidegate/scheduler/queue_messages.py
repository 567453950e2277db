"""Queue statuses as the messages and the JSON that clients read, and what those who ask say. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from google.protobuf import duration_pb2

from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError
from tidegate.scheduler.queue_status import State, Status
from tidegate.scheduler.request import ServiceClass
from tidegate.v1 import scheduler_pb2

LONGEST_PATIENCE_SECONDS: Final = 60.0

_STATES: Final = {
    State.WAITING: scheduler_pb2.QUEUE_STATE_WAITING,
    State.DISPATCHED: scheduler_pb2.QUEUE_STATE_DISPATCHED,
    State.REFUSED: scheduler_pb2.QUEUE_STATE_REFUSED,
    State.LEFT: scheduler_pb2.QUEUE_STATE_LEFT,
}


def to_proto(status: Status) -> scheduler_pb2.QueueStatus:
    """The status as a message."""
    expected = status.expected_wait_seconds
    service_class: Any = int(status.service_class)
    return scheduler_pb2.QueueStatus(
        request_id=status.request_id,
        service_class=service_class,
        position=status.position,
        waited=_duration(status.waited_seconds),
        expected_wait=None if expected is None else _duration(expected),
        state=_STATES[status.state],
        reason=status.reason,
    )


def to_json(asked_id: str, status: scheduler_pb2.QueueStatus) -> bytes:
    """The message as an object in the manner of OpenAI's, under the id by which it was asked for."""
    return msgspec.json.encode(
        {
            "id": asked_id,
            "object": "queue.status",
            "request_id": status.request_id,
            "class": ServiceClass(status.service_class).label,
            "position": status.position,
            "waited_ms": _milliseconds(status.waited),
            "eta_ms": _milliseconds(status.expected_wait) if status.HasField("expected_wait") else None,
            "status": scheduler_pb2.QueueState.Name(status.state).removeprefix("QUEUE_STATE_").lower(),
        }
    )


def patience_seconds(request: scheduler_pb2.WatchQueueStatusRequest) -> float:
    """How long to wait for the request to come.

    Raises:
        TidegateError: out of range.
    """
    seconds = request.patience.ToMilliseconds() / 1000
    if not 0 <= seconds <= LONGEST_PATIENCE_SECONDS:
        message = f"patience is {seconds} s, must be from 0 s to {LONGEST_PATIENCE_SECONDS:g} s"
        raise TidegateError(Reason.INVALID_VALUE, message, field="patience")
    return seconds


def tenant_of(context: Any) -> str | None:
    """Whose requests the caller may see; None for any, where nobody has said a tenant: not a client, then."""
    found = [value for key, value in context.invocation_metadata() or () if key == headers.TENANT]
    return str(found[-1]) if found else None


def is_asked_by_scheduler(context: Any) -> bool:
    """Whether the caller is another scheduler, which asks all of them."""
    return any(key == headers.ASKED_BY_SCHEDULER for key, _ in context.invocation_metadata() or ())


def _milliseconds(duration: duration_pb2.Duration) -> int:
    return round(duration.ToNanoseconds() / 1e6)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
