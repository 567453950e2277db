"""Whether an answer's tokens are the right ones, for engines whose answers can be known beforehand.

A simulated engine promises an answer that is a pure function of the prompt's token ids. A real engine samples, so
that only completeness can be checked, which the clients do for every answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, Protocol

from tidegate.bench.ledger import Outcome, Record

UNCHECKED_TOKEN_LIMIT: Final = 20_000_000
"""Tokens that wait for the run's end to be compared (80 MB); past it answers are compared as they come."""


class AnswerChecker(Protocol):
    """Knows an engine's answers."""

    def expected_tokens(self, prompt_token_ids: Sequence[int], count: int) -> Sequence[int]:
        """The first `count` tokens of the answer to a prompt."""


class Answers:
    """The answers of a run that are still to be compared; comparing costs CPU time, so it waits for the end.

    Args:
        checker: None checks nothing.
        prompt_of: makes the prompt of a record again.
    """

    def __init__(self, checker: AnswerChecker | None, prompt_of: PromptOf) -> None:
        self._checker = checker
        self._prompt_of = prompt_of
        self._unchecked: list[tuple[Record, array[int]]] = []
        self._unchecked_tokens = 0
        self.checked_count = 0

    def add(self, record: Record, token_ids: Sequence[int]) -> None:
        """Takes a complete answer; its record's outcome may become WRONG_TEXT, now or in `finish`."""
        if self._checker is None or not token_ids:
            return
        if self._unchecked_tokens + len(token_ids) > UNCHECKED_TOKEN_LIMIT:
            self._check(record, token_ids)
            return
        self._unchecked.append((record, array("i", token_ids)))
        self._unchecked_tokens += len(token_ids)

    def finish(self) -> None:
        """Compares all that wait."""
        for record, token_ids in self._unchecked:
            self._check(record, token_ids)
        self._unchecked.clear()
        self._unchecked_tokens = 0

    def _check(self, record: Record, token_ids: Sequence[int]) -> None:
        assert self._checker is not None
        self.checked_count += 1
        expected = self._checker.expected_tokens(self._prompt_of(record), len(token_ids))
        if list(expected) != list(token_ids):
            record.outcome = Outcome.WRONG_TEXT
            place = next(
                (at for at, pair in enumerate(zip(expected, token_ids, strict=False)) if pair[0] != pair[1]), -1
            )
            assert record.last is not None
            record.last.what = f"token {place} of {len(token_ids)} is not what the engine promises"


class PromptOf(Protocol):
    """Makes a record's prompt again."""

    def __call__(self, record: Record) -> Sequence[int]: ...
