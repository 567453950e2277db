"""From tokens to text while they come, ending at stop texts.

Invariants:
- What has been given out is always whole characters, and never has to be taken back.
- The pieces put together are the text of all tokens, cut before the stop text that is complete first (of two that
  complete together, the one that begins first), however the tokens were divided into pushes.
- No more is held back than an incomplete character and what may be the beginning of a stop text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from tidegate.text.tokenizer import Tokenizer


class DetokenizerStep(NamedTuple):
    """What one push brought."""

    text: str
    """Text to append; may be empty."""
    stopped: bool
    """True when a stop text is complete: the answer ends here."""
    token_count_used: int
    """How many of the pushed tokens belong to the answer; fewer than were pushed only when it stopped."""


class IncrementalDetokenizer:
    """The text of one answer, token by token.

    A continued answer (a resume) pushes the tokens of before first and throws their text away: what is still held
    back then comes out with the next push, exactly once.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stop = tuple(dict.fromkeys(text for text in stop if text))
        self._longest_beginning = max(map(len, self._stop), default=1) - 1
        # Most tokens neither end a stop text nor begin one, which one look at their letters tells.
        self._last_letters = frozenset(text[-1] for text in self._stop)
        self._beginning_letters = frozenset("".join(text[:-1] for text in self._stop))
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come; then nothing more does."""
        return self._stopped

    def push(self, token_ids: Sequence[int]) -> DetokenizerStep:
        """Takes the next tokens and gives the text that is certain now."""
        if self._stopped:
            return DetokenizerStep("", True, 0)
        if not self._stop:
            return DetokenizerStep(self._decode(b"".join(map(self._token_bytes, token_ids))), False, len(token_ids))
        pending = self._held
        for count, token_id in enumerate(token_ids, start=1):
            text = self._decode(self._token_bytes(token_id))
            pending += text
            cut = None if self._last_letters.isdisjoint(text) else self._first_stop(pending)
            if cut is not None:
                self._held, self._stopped = "", True
                return DetokenizerStep(pending[:cut], True, count)
        certain = len(pending) - self._beginning_length(pending)
        self._held = pending[certain:]
        return DetokenizerStep(pending[:certain], False, len(token_ids))

    def finish(self) -> str:
        """The text that was held back for a stop that did not come; a cut last character is dropped."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where to cut the text: before the stop that is complete first. None: there is none."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _beginning_length(self, text: str) -> int:
        """The length of the text's longest end that a stop text begins with."""
        if not text or text[-1] not in self._beginning_letters:
            return 0
        for length in range(min(self._longest_beginning, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
