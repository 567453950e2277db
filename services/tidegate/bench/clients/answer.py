"""What a client is given and what it notes, the same for all protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tidegate.bench.ledger import Ending
from tidegate.common.errors import Reason

CLASS_HEADER: Final = "x-service-class"
"""Beside the class in the body: what refuses from the headers alone goes by it."""

_LONGEST_WHAT: Final = 200
"""Characters of a failure's description."""

_NOT_REFUSALS: Final = {
    Reason.DEADLINE_EXCEEDED.name: Ending.DEADLINE_EXCEEDED,
    Reason.CANCELLED.name: Ending.FAILED,
    Reason.NUMERICAL_ERROR.name: Ending.FAILED,
    Reason.INTERNAL_ERROR.name: Ending.FAILED,
}


@dataclass(slots=True)
class Ask:
    """One attempt, ready to be sent."""

    number: int
    prompt: Any
    """[token_count] int32, or a text; what the client asked for with `wants_text`."""
    max_tokens: int
    service_class: str
    tenant: str
    timeout_seconds: float


@dataclass(slots=True)
class Answer:
    """What came of one attempt so far. Times are those of the clock that the client was given."""

    accepted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    token_count: int = 0
    token_ids: list[int] = field(default_factory=list)
    """Where the protocol has them."""
    texts: list[str] = field(default_factory=list)
    """The answer's text, in the pieces that it came in."""
    usage_token_count: int | None = None
    """What a complete answer's usage says; None where the server did not."""
    ending: Ending | None = None
    """None until it ended."""
    reason: str = ""
    retry_after_seconds: float | None = None
    what: str = ""
    request_id: str = ""

    def complete(self, usage_token_count: int | None) -> None:
        """The server said that this was all; True only if it was, and nothing is missing in between."""
        if usage_token_count is not None and usage_token_count != self.token_count:
            self.fail(f"{self.token_count} tokens came, the usage says {usage_token_count}")
        elif not self.token_count:
            self.fail("an answer without a token")
        else:
            self.usage_token_count = usage_token_count
            self.ending = Ending.COMPLETED

    def refuse(self, reason: str, retry_after_seconds: float | None, what: str) -> None:
        """The server ended it with a reason: refused, unless the reason is a failure or a deadline."""
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds
        self.ending = _NOT_REFUSALS.get(reason, Ending.REFUSED)
        if self.ending is Ending.REFUSED and self.token_count:
            # What was begun and then taken back is no refusal.
            self.ending = Ending.FAILED
        self.what = f"{reason}: {what}"[:_LONGEST_WHAT]

    def fail(self, what: str) -> None:
        """It went wrong without a reason of the server's."""
        self.ending = Ending.FAILED
        self.what = what[:_LONGEST_WHAT]


class Client(Protocol):
    """Speaks one protocol to one target."""

    wants_text: bool
    """Whether prompts are texts; else tokens."""

    async def start(self) -> None:
        """Connects.

        Raises:
            OSError: the target does not answer.
        """

    async def ask(self, ask: Ask, answer: Answer) -> None:
        """Sends one request and notes into `answer` what comes, to the end. Cancelling it ends the request."""

    async def close(self) -> None:
        """Ends all connections."""
