"""One request from its first attempt to its outcome: time limits, leaving, retries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from tidegate.bench.clients.answer import Answer, Ask, Client
from tidegate.bench.flows import Flow
from tidegate.bench.ledger import Attempt, Ending, Record, judge
from tidegate.bench.retries import attempt_patience, next_delay

GRACE_SECONDS: Final = 0.25
"""The server is told the deadline; the client waits so much longer for the server's own word on it."""

STOPPED: Final = "the run was stopped"


class Exchange:
    """Runs requests against one client.

    Args:
        now: seconds since the beginning of the run.
    """

    def __init__(self, client: Client, now: Callable[[], float]) -> None:
        self._client = client
        self._now = now

    async def run(self, record: Record, flow: Flow, prompt: Any, leave_seconds: float) -> Answer | None:
        """Sends one request, again where its client would; fills in the record.

        Returns:
            The answer of the last attempt; None where none was made.
        """
        gives_up_at = record.planned + flow.waits_seconds
        leaves_at = record.planned + leave_seconds
        due = record.planned
        answer: Answer | None = None
        try:
            while True:
                remaining = gives_up_at - self._now()
                patience = attempt_patience(flow.retries, len(record.attempts), flow.waits_seconds, remaining)
                if patience <= 0 or leaves_at <= self._now():
                    break
                ask = Ask(record.number, prompt, record.asked_tokens, record.service_class, record.tenant, patience)
                answer = Answer()
                attempt = await self._attempt(record, ask, answer, due, leaves_at)
                delay = next_delay(flow.retries, attempt, len(record.attempts), gives_up_at - self._now())
                if delay is None:
                    break
                due = attempt.ended + delay
                await asyncio.sleep(delay)
        finally:
            record.outcome = judge(record)
        return answer

    async def _attempt(self, record: Record, ask: Ask, answer: Answer, due: float, leaves_at: float) -> Attempt:
        sent = self._now()
        attempt = Attempt(due=due, sent=sent, ended=sent, ending=Ending.LEFT, what=STOPPED)
        record.attempts.append(attempt)
        limit = min(ask.timeout_seconds + GRACE_SECONDS, leaves_at - sent)
        try:
            async with asyncio.timeout(limit):
                await self._client.ask(ask, answer)
            assert answer.ending is not None, "a client that ends says how"
            attempt.ending, attempt.what = answer.ending, answer.what
        except TimeoutError:
            attempt.ending = Ending.LEFT if limit == leaves_at - sent else Ending.DEADLINE_EXCEEDED
            attempt.what = ""
        finally:
            attempt.ended = self._now()
            _note(answer, attempt)
        return attempt


def _note(answer: Answer, attempt: Attempt) -> None:
    attempt.accepted = answer.accepted
    attempt.first_token = answer.first_token
    attempt.last_token = answer.last_token
    attempt.token_count = answer.token_count
    attempt.reason = answer.reason
    attempt.retry_after_seconds = answer.retry_after_seconds
    if attempt.ending is not Ending.COMPLETED:
        attempt.request_id = answer.request_id
