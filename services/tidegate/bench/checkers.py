"""Whether an answer is the right one, byte for byte, for engines whose answers can be known beforehand.

A simulated engine promises an answer that is a pure function of the prompt's token ids. A real engine samples, so
that only completeness can be checked, which the clients do for every answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from tidegate.bench.clients.answer import Answer
from tidegate.bench.ledger import Outcome, Record

UNCHECKED_TOKEN_LIMIT: Final = 20_000_000
"""Tokens that wait for the run's end to be compared (80 MB, and twice as much for their text); past it answers are
compared as they come."""


class AnswerChecker(Protocol):
    """Knows an engine's answers."""

    def expected_tokens(self, prompt_token_ids: Sequence[int], count: int) -> Sequence[int]:
        """The first `count` tokens of the answer to a prompt."""

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that `expected_tokens` gave."""

    def chat_token_ids(self, text: str) -> Sequence[int]:
        """The prompt that the engine has to get for a chat of one message, a user's."""


class Answers:
    """The answers of a run that are still to be compared; comparing costs CPU time, so it waits for the end.

    Args:
        checker: None checks nothing.
        prompt_of: makes the prompt of a record again.
    """

    def __init__(self, checker: AnswerChecker | None, prompt_of: PromptOf) -> None:
        self._checker = checker
        self._prompt_of = prompt_of
        self._unchecked: list[_Unchecked] = []
        self._unchecked_tokens = 0
        self.checked_count = 0

    def add(self, record: Record, answer: Answer) -> None:
        """Takes a complete answer; its record's outcome may become WRONG_TEXT, now or in `finish`."""
        if self._checker is None:
            return
        # An answer whose tokens the server did not count has as many as were asked for: clients send ignore_eos.
        count = answer.usage_token_count or record.asked_tokens
        unchecked = _Unchecked(record, count, array("i", answer.token_ids), "".join(answer.texts))
        if self._unchecked_tokens + count > UNCHECKED_TOKEN_LIMIT:
            self._check(self._checker, unchecked)
            return
        self._unchecked.append(unchecked)
        self._unchecked_tokens += count

    def finish(self) -> None:
        """Compares all that wait."""
        for unchecked in self._unchecked:
            assert self._checker is not None
            self._check(self._checker, unchecked)
        self._unchecked.clear()
        self._unchecked_tokens = 0

    def _check(self, checker: AnswerChecker, unchecked: _Unchecked) -> None:
        self.checked_count += 1
        record, count, token_ids, text = unchecked
        prompt = self._prompt_of(record)
        prompt_token_ids = checker.chat_token_ids(prompt) if isinstance(prompt, str) else prompt
        expected = checker.expected_tokens(prompt_token_ids, count)
        promised = checker.text_of(expected)
        if token_ids and list(token_ids) != list(expected):
            what = f"token {_difference(token_ids, expected)} of {count} is not what the engine promises"
        elif text != promised:
            what = f"the text is not what the engine promises from character {_difference(text, promised)} on"
        else:
            return
        record.outcome = Outcome.WRONG_TEXT
        assert record.last is not None
        record.last.what = what


class PromptOf(Protocol):
    """Makes a record's prompt again: its tokens, or the text of a chat's only message."""

    def __call__(self, record: Record) -> Sequence[int] | str: ...


class _Unchecked(NamedTuple):
    record: Record
    token_count: int
    token_ids: array[int]
    """Empty where the protocol has none."""
    text: str


def _difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first place at which two differ, which is the shorter one's end where the other goes on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))
