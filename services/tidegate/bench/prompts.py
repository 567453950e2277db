"""The prompts of a run: no two alike, none kept, each made again from its number.

Two prompts differ in their first tokens (after a prefix that is shared on purpose), so that no cache and no prefix
cache answers what was meant to be computed. Blocks of a trace with the same id are the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tidegate.bench.traces import HASH_BLOCK_TOKENS

LOWEST_TOKEN: Final = 1_000
HIGHEST_TOKEN: Final = 41_000
"""Ordinary tokens of the default model's vocabulary of 49,152; ids below are bytes and control tokens."""

_POOL_TOKENS: Final = 1 << 16
"""Random tokens that prompts are cut out of; making each anew would cost more than sending it."""

_WORDS: Final = (
    "tide water moon shore sand wave salt wind rock boat sail bay reef deep blue cold warm east west north south sun "
    "rain cloud storm calm river lake sea ocean fish bird gull crab shell pearl net rope mast deck port harbour light "
    "night day hour time year long short high low fast slow old new first last near far one two three four five"
)

WORDS: Final = tuple(_WORDS.split(" "))
"""Short words that common vocabularies have as one token each."""


class Prompts:
    """Makes prompts.

    Args:
        seed: another seed gives other prompts.
        lowest, highest: tokens are of [lowest, highest).
    """

    def __init__(self, seed: int, lowest: int = LOWEST_TOKEN, highest: int = HIGHEST_TOKEN) -> None:
        self._lowest = lowest
        self._base = highest - lowest
        self._seed = seed
        self._pool = np.random.default_rng([seed, _POOL_TOKENS]).integers(lowest, highest, _POOL_TOKENS, np.int32)

    def token_ids(
        self, number: int, token_count: int, *, prefix: tuple[int, int] = (0, 0), block_ids: Sequence[int] = ()
    ) -> NDArray[np.int32]:
        """The prompt of request `number`: [token_count] int32.

        Args:
            prefix: whose shared beginning (any number), and how many tokens of it.
            block_ids: the prompt's blocks of 512 tokens by name, from its beginning; they take the prefix's place.
        """
        whose, prefix_count = prefix
        pieces = [self._cut(-1 - block, HASH_BLOCK_TOKENS) for block in block_ids]
        if prefix_count and not block_ids:
            pieces.append(self._cut(-1 - whose, min(prefix_count, token_count)))
        if not block_ids:
            pieces.append(self._digits(number))
        missing = token_count - sum(map(len, pieces))
        if missing > 0:
            pieces.append(self._cut(number, missing))
        return np.concatenate(pieces)[:token_count]

    def text(self, number: int, word_count: int, *, prefix: tuple[int, int] = (0, 0)) -> str:
        """A prompt in words, for surfaces that take no tokens; about a token a word."""
        ids = self.token_ids(number, word_count, prefix=prefix)
        return " ".join([WORDS[each % len(WORDS)] for each in ids.tolist()])

    def _digits(self, number: int) -> NDArray[np.int32]:
        digits = []
        while True:
            number, digit = divmod(number, self._base)
            digits.append(self._lowest + digit)
            if not number:
                return np.array(digits, np.int32)

    def _cut(self, name: int, count: int) -> NDArray[np.int32]:
        begin = (name * 2_654_435_761 + self._seed) % _POOL_TOKENS
        repeats = -(-(begin + count) // _POOL_TOKENS)
        pool = self._pool if repeats == 1 else np.tile(self._pool, repeats)
        return pool[begin : begin + count]
