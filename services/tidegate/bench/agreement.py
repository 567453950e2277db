"""The ledger beside the server's own counts. Pure.

Both sides count attempts. A client that leaves, or whose patience ends, before it heard anything cannot know whether
it was dispatched, refused or abandoned; such attempts widen what the ledger allows, and nothing else does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from tidegate.bench.ledger import Attempt, Comparison, Ending, Record
from tidegate.bench.watching import ServerCounts

BEFORE_THE_SCHEDULER: Final = frozenset(
    {"RATE_LIMIT_EXCEEDED", "INVALID_API_KEY", "UNKNOWN_URL", "METHOD_NOT_ALLOWED", "REQUEST_TOO_LARGE", "INVALID_HTTP"}
)
"""Reasons with which Envoy refuses what the scheduler never sees."""

SHED_REASON: Final = "SERVER_IS_OVERLOADED"
"""With which Envoy refuses what the scheduler cannot decide in time."""


def compare(records: Sequence[Record], server: ServerCounts) -> list[Comparison]:
    """Each count as both sides have it.

    Args:
        records: of the whole run.
        server: what the server counted between the run's beginning and its end; nobody else may have used it.
    """
    attempts = [attempt for record in records for attempt in record.attempts]
    unknown = sum(_is_unknown(attempt) for attempt in attempts)
    refused = Counter(attempt.reason for attempt in attempts if attempt.ending is Ending.REFUSED)
    answered = sum(_is_answered(attempt) for attempt in attempts)
    at_envoy = sum(count for reason, count in refused.items() if reason in BEFORE_THE_SCHEDULER)
    failed_unheard = sum(attempt.ending is Ending.FAILED and not _is_answered(attempt) for attempt in attempts)
    doubtful = unknown + failed_unheard
    reached = len(attempts) - at_envoy - server.shed
    rows = [
        _row("requests that reached the scheduler", reached - doubtful, reached, server.received),
        _row(
            "sent to a replica or to the cache",
            answered,
            answered + doubtful + _refused_by_model(server),
            server.dispatched + server.replayed + server.passed_through,
            "with a credit, from the cache, or left to Envoy",
        ),
        _row("left while they waited", 0, doubtful, server.abandoned),
    ]
    for reason in sorted({*refused, *server.refused} - BEFORE_THE_SCHEDULER):
        count = refused[reason]
        counted = server.refused.get(reason, 0) + (server.model or {}).get(f"refused/{reason}", 0)
        counted += server.shed if reason == SHED_REASON else 0
        rows.append(_row(f"refused {reason}", count, count + doubtful, counted))
    if server.model is not None:
        rows += _model_rows(attempts, server.model, doubtful)
    return rows


def _model_rows(attempts: list[Attempt], model: dict[str, int], doubtful: int) -> list[Comparison]:
    completed = sum(attempt.ending is Ending.COMPLETED for attempt in attempts)
    cut = sum(attempt.ending in (Ending.LEFT, Ending.DEADLINE_EXCEEDED) for attempt in attempts)
    ended = model.get("cancelled", 0) + model.get("deadline_exceeded", 0)
    return [
        _row(
            "answers completed by the replicas", completed, completed + cut + doubtful, model.get("completed", 0),
            "a client may leave while the last token travels",
        ),
        _row("answers cut by their clients or deadlines", 0, cut + doubtful, ended),
    ]  # fmt: skip


def _row(name: str, low: int, high: int, server: int, note: str = "") -> Comparison:
    return Comparison(name=name, client_low=low, client_high=high, server=server, note=note)


def _is_answered(attempt: Attempt) -> bool:
    return attempt.ending is not Ending.REFUSED and (attempt.accepted is not None or attempt.first_token is not None)


def _is_unknown(attempt: Attempt) -> bool:
    return attempt.ending in (Ending.LEFT, Ending.DEADLINE_EXCEEDED) and not _is_answered(attempt)


def _refused_by_model(server: ServerCounts) -> int:
    return (server.model or {}).get("refused", 0)
