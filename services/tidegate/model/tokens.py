"""What an engine gives for one answer, whoever runs the engine."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tidegate.v1 import inference_pb2


class Chunk(msgspec.Struct, frozen=True):
    """Some tokens of an answer, in order, and perhaps its end."""

    token_ids: Sequence[int]
    logprobs: Sequence[inference_pb2.TokenLogprob] = ()
    """One entry a token, where they were asked for."""
    finish_reason: str = ""
    """Empty, `stop` or `length`."""
    unseen_token_count: int = 0
    """Tokens that were generated and not given: the end-of-text token."""
    cached_token_count: int = 0
    """Tokens, first of the prompt, whose computation was reused."""


class Buffer:
    """What was generated and not sent yet: texts and tokens that go out together as one delta. Pure.

    Bounded by whoever fills it: it asks `is_full` and waits. One chunk more than the bound may be in it.

    Args:
        token_limit: tokens at which it is full.
    """

    def __init__(self, token_limit: int) -> None:
        self._token_limit = token_limit
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[inference_pb2.TokenLogprob] = []

    def add(self, text: str, token_ids: Sequence[int], logprobs: Sequence[inference_pb2.TokenLogprob]) -> None:
        """Puts more behind what is there; `text` may lag behind its tokens, never run ahead of them."""
        if text:
            self._texts.append(text)
        self._token_ids += token_ids
        if logprobs:
            self._logprobs += logprobs

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be added before something was taken."""
        return len(self._token_ids) >= self._token_limit

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return not self._token_ids and not self._texts

    def move_to(self, delta: inference_pb2.Delta) -> None:
        """Puts all that is there into a new delta."""
        delta.text = self._texts[0] if len(self._texts) == 1 else "".join(self._texts)
        delta.token_ids.extend(self._token_ids)
        if self._logprobs:
            delta.logprobs.extend(self._logprobs)
        self._texts, self._token_ids, self._logprobs = [], [], []
