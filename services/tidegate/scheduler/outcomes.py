"""What became of the requests: the closed set of outcomes, counted once each, in totals, metrics and log lines."""

from __future__ import annotations

import enum
from collections import Counter as Tally

import structlog
from prometheus_client import Counter, Histogram

from tidegate.common.errors import TidegateError
from tidegate.common.metrics import REQUEST_BUCKETS
from tidegate.scheduler.anomalies import Anomalies
from tidegate.scheduler.request import Request

log = structlog.get_logger()


class Outcome(enum.Enum):
    """How a request left the scheduler."""

    DISPATCHED = "dispatched"
    REPLAYED = "replayed"
    PASSED_THROUGH = "passed_through"
    REFUSED = "refused"
    ABANDONED = "abandoned"


REQUESTS = Counter(
    "tidegate_scheduled_requests", "Requests, by outcome of the scheduling.", ["outcome", "class", "reason"]
)
QUEUE_WAIT = Histogram(
    "tidegate_queue_wait_seconds", "From a request's place in a lane to its credit.", ["class"], buckets=REQUEST_BUCKETS
)
UNREAD = Counter("tidegate_refused_unread_requests", "Refused from their headers alone; the rest had sent a body.")
LITE = Counter("tidegate_lite_requests", "Requests that were sent to the lite model with a credit.", ["why"])
DECISION = Histogram(
    "tidegate_decision_seconds",
    "From a request's whole body to its decision, without the queue.",
    buckets=REQUEST_BUCKETS,
)


class Outcomes:
    """The counts since the start.

    Args:
        anomalies: is told of each request that left, too.
    """

    def __init__(self, anomalies: Anomalies | None = None) -> None:
        self._anomalies = anomalies
        self.received = 0
        self.by_outcome: Tally[Outcome] = Tally()
        self.refused_by_reason: Tally[str] = Tally()
        self.refused_unread_count = 0
        self.lite_count = 0

    @property
    def held_request_count(self) -> int:
        """Requests that came and have no outcome yet."""
        return self.received - self.by_outcome.total()

    def receive(self) -> None:
        """A request came."""
        self.received += 1

    def count_lite(self, why: str) -> None:
        """A request goes to the lite model; it is dispatched, too."""
        self.lite_count += 1
        LITE.labels(why).inc()

    def end(self, request: Request, outcome: Outcome, now: float, error: TidegateError | None = None) -> None:
        """A request left, in this way; `error` says why it was refused."""
        self.by_outcome[outcome] += 1
        reason = error.reason.name if error is not None else ""
        if error is not None:
            self.refused_by_reason[reason] += 1
            if request.body_arrived_at is None:
                self.refused_unread_count += 1
                UNREAD.inc()
        REQUESTS.labels(outcome.value, request.service_class.label, reason).inc()
        if outcome is Outcome.DISPATCHED:
            QUEUE_WAIT.labels(request.service_class.label).observe(request.queue_seconds)
        if request.body_arrived_at is not None:
            DECISION.observe(max(0.0, now - request.body_arrived_at - request.queue_seconds))
        if self._anomalies is not None:
            self._anomalies.observe(request, refused=outcome is Outcome.REFUSED, abandoned=outcome is Outcome.ABANDONED)
        self._log(request, outcome, now, error)

    def _log(self, request: Request, outcome: Outcome, now: float, error: TidegateError | None) -> None:
        fields = {
            "request_id": request.request_id,
            "tenant": request.tenant,
            "service_class": request.service_class.label,
            "prompt_token_count": request.prompt_token_count,
            "queue_seconds": round(request.queue_seconds, 6),
            "total_seconds": round(now - request.arrived_at, 6),
        }
        if error is not None:
            log.info("request_refused", reason=error.reason.name, message=error.message, **fields)
        elif outcome is Outcome.ABANDONED:
            log.info("request_abandoned", **fields)
        else:
            # The model service, or the cache, writes the one line of a request that is served.
            log.debug("request_scheduled", outcome=outcome.value, **fields)
