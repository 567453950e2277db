"""One attempt of a client, from its planned time to its end. Data alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from tidegate.model.call import ENGINE_PRIORITIES
from tidegate.scheduler.request import ServiceClass


class End(enum.Enum):
    """How an attempt ended; the set is closed."""

    COMPLETED = "completed"
    REFUSED = "refused"
    FAILED = "failed"
    EXPIRED = "expired"
    LEFT = "left"


@dataclass(slots=True, eq=False)
class Job:
    """One attempt.

    Args:
        sent_at: when the client meant to send it; latencies count from here.
        deadline_seconds: after this the answer is worth nothing, and the client gives up. None: it waits for ever.
        leaves_after_seconds: the client goes away then, whatever has come. None: it stays.
        answer_token_count: what the model would say; the mesh does not know it.
        attempt: 0 for the first.
        origin: the first attempt of the same wish; None for itself.
    """

    job_id: str
    sent_at: float
    prompt_token_count: int = 100
    answer_token_count: int = 20
    max_tokens: int = 256
    tenant: str = "one"
    service_class: ServiceClass = ServiceClass.STANDARD
    deadline_seconds: float | None = None
    leaves_after_seconds: float | None = None
    attempt: int = 0
    origin: Job | None = None

    admitted_at: float | None = None
    told_wait_seconds: float | None = None
    """What it was told of its wait as it began, where it asked and that was known."""
    is_owed: bool = False
    """Whether its class's floor pays for it, as the header tells the replica."""
    dispatched_at: float | None = None
    reached_replica_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    end: End | None = None
    reason: str = ""
    retry_after_seconds: float | None = None
    prefilled_token_count: int = 0
    generated_token_count: int = 0
    replica_address: str = ""
    was_shortened: bool = False
    """Whether a brownout set a bound on its answer."""

    scheduler: Any = None
    """Who holds it while it waits."""
    replica: Any = None
    """Where it is, once it is there."""

    @property
    def is_good(self) -> bool:
        """Complete and within its deadline."""
        return self.end is End.COMPLETED and (
            self.deadline_seconds is None or self.ended_at - self.sent_at <= self.deadline_seconds  # type: ignore[operator]
        )

    @property
    def time_to_first_token_seconds(self) -> float | None:
        """From the planned time; None while there is no token."""
        return None if self.first_token_at is None else self.first_token_at - self.sent_at

    @property
    def queue_seconds(self) -> float | None:
        """From its place in a lane to its credit; None where it has not come so far."""
        waited = self.dispatched_at is not None and self.admitted_at is not None
        return self.dispatched_at - self.admitted_at if waited else None  # type: ignore[operator]

    @property
    def engine_priority(self) -> int:
        """As `model/call.py` has it."""
        return ENGINE_PRIORITIES["realtime" if self.is_owed else self.service_class.label]

    @property
    def token_count(self) -> int:
        """What it cost the engines so far."""
        return self.prefilled_token_count + self.generated_token_count
