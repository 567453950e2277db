"""Whether a request may wait, and when a refused one should come back. Pure: time and randomness come in.

A request is refused, in this order: its deadline has passed; no replica has been there for a while; its lane is
full; the measured drain rate says that its turn would come after its deadline. With no measured rate nothing is
refused for its deadline: an honest "not known" is no reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidegate.common.errors import Reason, TidegateError
from tidegate.scheduler.forecast import expected_wait
from tidegate.scheduler.lanes import Lanes
from tidegate.scheduler.request import Request, ServiceClass

SHORTEST_RETRY_SECONDS: Final = 1.0
LONGEST_RETRY_SECONDS: Final = 3600.0

RETRY_JITTER: Final = 0.5
"""A retry time is stretched by up to this share, so that those refused together do not come back together."""

RETRY_ROOM_SHARE: Final = 0.1
"""Those refused by a full lane are told the time in which this share of it drains."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What admission must know of the moment.

    Args:
        now: monotonic seconds.
        drain_rate: requests per second; None when not known.
        absence_seconds: for how long there has been no ready replica; 0 while there is one.
        held_request_count: requests in any stage with this scheduler, the one that is asked about included.
        random_share: uniform in [0, 1), for the jitter.
    """

    now: float
    drain_rate: float | None
    absence_seconds: float
    held_request_count: int
    random_share: float


class Admission:
    """The rules, with their bounds.

    Args:
        replica_grace_seconds: after so long without a replica, requests are refused.
        held_request_limit: past so many requests in all stages, headers are refused.
        default_retry_seconds: when to come back, as long as no drain rate is known.
    """

    def __init__(
        self, lanes: Lanes, *, replica_grace_seconds: float, held_request_limit: int, default_retry_seconds: float
    ) -> None:
        self._lanes = lanes
        self._replica_grace_seconds = replica_grace_seconds
        self._held_request_limit = held_request_limit
        self._default_retry_seconds = default_retry_seconds

    def refusal_of_headers(self, request: Request, conditions: Conditions) -> TidegateError | None:
        """Why a request can be refused before its body is read; None when it cannot.

        The class is often known from the body only, so a full lane counts here where the mesh named the class, or
        where all lanes are full.
        """
        if conditions.held_request_count > self._held_request_limit:
            message = f"The scheduler is at its limit of {self._held_request_limit} requests"
            return self._overloaded(message, conditions)
        if request.named_class is not None:
            bound = self._lanes.lane(request.named_class).full_bound(0, 0)
            if bound:
                return self._full(request.named_class, bound, conditions)
        elif all(self._lanes.lane(service_class).full_bound(0, 0) for service_class in ServiceClass):
            return self._overloaded(f"All queues are full; {len(self._lanes)} requests wait in them", conditions)
        return self._refusal_of_any(request, conditions)

    def refusal(self, request: Request, conditions: Conditions) -> TidegateError | None:
        """Why a prepared request may not wait; None when it may. Its deadline is set by now."""
        assert request.deadline is not None
        refused = self._refusal_of_any(request, conditions)
        if refused is not None:
            return refused
        lane = self._lanes.lane(request.service_class)
        bound = lane.full_bound(request.token_count, request.body_byte_count)
        if bound:
            return self._full(request.service_class, bound, conditions)
        before = self._lanes.count_before(request.service_class)
        wait = expected_wait(before, conditions.drain_rate)
        left = request.deadline - conditions.now
        if wait is None or wait <= left:
            return None
        return TidegateError(
            Reason.SERVER_IS_OVERLOADED,
            f"{before} requests wait before this one, for about {_seconds(wait)}, and its deadline is in {left:.1f} s",
            retry_after_seconds=_retry_seconds(wait - left, conditions),
        )

    def _refusal_of_any(self, request: Request, conditions: Conditions) -> TidegateError | None:
        if request.deadline is not None and request.deadline <= conditions.now:
            return deadline_passed(request, conditions.now)
        if conditions.absence_seconds > self._replica_grace_seconds:
            return self.no_replica(conditions)
        return None

    def no_replica(self, conditions: Conditions) -> TidegateError:
        """The refusal of a request that nobody could answer now."""
        return TidegateError(
            Reason.REPLICA_UNAVAILABLE,
            f"No replica has been ready for {conditions.absence_seconds:.1f} s",
            retry_after_seconds=_retry_seconds(self._default_retry_seconds, conditions),
        )

    def _full(self, service_class: ServiceClass, bound: str, conditions: Conditions) -> TidegateError:
        count = len(self._lanes.lane(service_class))
        return self._overloaded(
            f"The {service_class.label} queue is full by {bound}; {count} requests wait in it", conditions
        )

    def _overloaded(self, message: str, conditions: Conditions) -> TidegateError:
        leaving = max(1, round(len(self._lanes) * RETRY_ROOM_SHARE))
        seconds = expected_wait(leaving, conditions.drain_rate)
        return TidegateError(
            Reason.SERVER_IS_OVERLOADED,
            message,
            retry_after_seconds=_retry_seconds(self._default_retry_seconds if seconds is None else seconds, conditions),
        )


def deadline_passed(request: Request, now: float) -> TidegateError:
    """The refusal of a request whose deadline passed before a replica took it."""
    return TidegateError(
        Reason.DEADLINE_EXCEEDED, f"The deadline passed after {now - request.arrived_at:.1f} s in the queue"
    )


def _retry_seconds(seconds: float, conditions: Conditions) -> float:
    bounded = min(max(seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
    return bounded * (1 + RETRY_JITTER * conditions.random_share)


def _seconds(seconds: float) -> str:
    return "an unknown time" if seconds == float("inf") else f"{seconds:.1f} s"
