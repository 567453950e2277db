"""The ledger: what became of every request, as its client saw it.

Invariants: one record a planned request, with exactly one outcome of a closed set; one attempt each time that it was
sent; latency counts from the planned time and not from when the generator got round to it, so a server that stalls
cannot make the requests that were not sent look fast. All times are seconds from the beginning of the run.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tidegate.bench.flows import RetryPolicy, ServiceClassName
from tidegate.bench.plan import Plan
from tidegate.bench.samples import Sample


class Ending(enum.StrEnum):
    """How one attempt ended."""

    COMPLETED = "completed"
    """A whole answer with its end."""
    REFUSED = "refused"
    """The server said no, with a reason, before any token."""
    DEADLINE_EXCEEDED = "deadline_exceeded"
    """The server said so, or the client's patience ended."""
    FAILED = "failed"
    """Anything that was not meant: a broken stream, a lost connection, an answer with gaps."""
    LEFT = "left"
    """The client went away on purpose."""


class Outcome(enum.StrEnum):
    """What became of a request."""

    IN_TIME = "in_time"
    """A whole answer within the deadline, its text right as far as that can be known: goodput."""
    LATE = "late"
    REFUSED = "refused"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    FAILED = "failed"
    WRONG_TEXT = "wrong_text"
    LEFT = "left"
    NOT_SENT = "not_sent"
    """The generator could not send it; with any of these, the figures are not the server's."""


class Attempt(msgspec.Struct, array_like=True, gc=False):
    """One time that a request was sent."""

    due: float
    """When it was to be sent: at the planned time, or after the client's wait since the attempt before."""
    sent: float
    ended: float
    ending: Ending
    accepted: float | None = None
    """The first sign that it will be answered; over HTTP the same moment as the response's head."""
    first_token: float | None = None
    last_token: float | None = None
    token_count: int = 0
    """Tokens that came, wanted or not."""
    reason: str = ""
    """Of a refusal: the word of common/errors.py, or what the server had in its place."""
    retry_after_seconds: float | None = None
    """Of a refusal: when it said to come back."""
    what: str = ""
    """Of a failure: one line."""
    request_id: str = ""
    """x-request-id of what did not complete, to find it in the mesh's logs."""


class Record(msgspec.Struct, array_like=True):
    """One request."""

    number: int
    """Its place in the plan; with a closed loop, any number that no other has."""
    flow: str
    tenant: str
    service_class: ServiceClassName
    planned: float
    deadline_seconds: float
    prompt_tokens: int
    asked_tokens: int
    """The most tokens that the answer might have."""
    outcome: Outcome = Outcome.NOT_SENT
    attempts: list[Attempt] = []

    @property
    def last(self) -> Attempt | None:
        """The attempt that decided."""
        return self.attempts[-1] if self.attempts else None

    @property
    def token_count(self) -> int:
        """Tokens that came, of all attempts."""
        return sum(attempt.token_count for attempt in self.attempts)


class WorkerFigures(msgspec.Struct, kw_only=True):
    """What a generating process says of itself."""

    request_count: int = 0
    token_count: int = 0
    cpu_seconds: float = 0.0
    """Of the process while it generated, its threads included."""
    wall_seconds: float = 0.0
    largest_in_flight: int = 0
    checked_answers: int = 0
    """Answers whose text, and tokens where the protocol has them, were compared with what the engine promises."""


class Ledger(msgspec.Struct, kw_only=True):
    """A run: the plan, every request, and what was seen of the server meanwhile."""

    name: str
    """What this run is called in tables and pages."""
    plan: Plan
    began_unix_seconds: float
    duration_seconds: float
    """The plan's duration; what was sent after it does not exist, what ended after it counts."""
    records: list[Record]
    workers: list[WorkerFigures] = []
    samples: list[Sample] = []
    """The scheduler, several times a second; empty where none was watched."""
    agreement: list[Comparison] = []
    """The ledger's counts beside the server's; empty where the server's were not read."""
    interrupted: bool = False
    """Whether it was stopped before its end."""


class Comparison(msgspec.Struct, kw_only=True, frozen=True):
    """One count as both sides have it."""

    name: str
    client_low: int
    client_high: int
    """Where the client cannot know (it left before it heard), both bounds; else the same."""
    server: int
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the server's count is one that the client's ledger allows."""
        return self.client_low <= self.server <= self.client_high


def judge(record: Record) -> Outcome:
    """What became of a request, from its attempts."""
    last = record.last
    if last is None:
        return Outcome.NOT_SENT
    if last.ending is Ending.COMPLETED:
        seconds = (last.last_token if last.last_token is not None else last.ended) - record.planned
        return Outcome.IN_TIME if seconds <= record.deadline_seconds else Outcome.LATE
    return Outcome(last.ending.value)


def merged(parts: Iterable[list[Record]]) -> list[Record]:
    """The records of several processes as one ledger's, by planned time."""
    records = [record for part in parts for record in part]
    records.sort(key=lambda record: (record.planned, record.number))
    return records


def write(ledger: Ledger, path: Path) -> None:
    """Writes a ledger to a file, as MessagePack; `read` gets it back."""
    path.write_bytes(msgspec.msgpack.encode(ledger))


def read(path: Path) -> Ledger:
    """Reads a ledger that `write` wrote."""
    return msgspec.msgpack.decode(path.read_bytes(), type=Ledger)


__all__ = [
    "Attempt", "Comparison", "Ending", "Ledger", "Outcome", "Record", "RetryPolicy", "WorkerFigures", "judge", "merged",
    "read", "write",
]  # fmt: skip
