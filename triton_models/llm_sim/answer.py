"""What the simulated engine answers: a pure function of the prompt's tokens, so that anybody can check an answer.

Needs nothing but Python, so that a load generator can load it from this file
(`importlib.util.spec_from_file_location`) in any environment. Invariant: the token at a place depends on the prompt's
token ids, the place and the table alone: not on the batch, the replica, the sampling or an interruption.

    table = answer_table(texts of the vocabulary, in the order of their ids)
    expected_token_ids(prompt_token_ids, count, table)
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from statistics import NormalDist

# A leading space, as byte-level BPE ("Ġ") and SentencePiece ("▁") write it, and a lower-case word: tokens that decode
# to the same text whatever stands beside them.
_WORD = re.compile(r"[Ġ▁][a-z]{2,12}")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# Of the prompt's seed, so that the length is drawn apart from the tokens.
_LENGTH_STREAM = 0x5DEECE66D

LONGEST_ANSWER_TOKENS = 1 << 24


def answer_table(token_texts: Iterable[str]) -> list[int]:
    """The token ids that answers are made of, in their order.

    Args:
        token_texts: the vocabulary as model files hold it (GGUF's `tokenizer.ggml.tokens`, tokenizer.json's `vocab`
            by id): "Ġtide" for " tide".

    Raises:
        ValueError: the vocabulary has no such tokens.
    """
    table = [token_id for token_id, text in enumerate(token_texts) if _WORD.fullmatch(text)]
    if not table:
        raise ValueError("the vocabulary has no token that is a space and a lower-case word")
    return table


def answer_seed(prompt_token_ids: Sequence[int]) -> int:
    """64 bits that stand for a prompt: BLAKE2b of its token ids as little-endian int32."""
    words = array("i", prompt_token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little")


def answer_token(seed: int, position: int, table: Sequence[int]) -> int:
    """The token at a place, counted from 0, of the answer to the prompt with this seed."""
    return table[_mixed(seed + (position + 1) * _GOLDEN) % len(table)]


def expected_token_ids(prompt_token_ids: Sequence[int], count: int, table: Sequence[int]) -> list[int]:
    """The first tokens of the answer to a prompt."""
    seed = answer_seed(prompt_token_ids)
    return [answer_token(seed, position, table) for position in range(count)]


def natural_token_count(seed: int, *, median: float, sigma: float) -> int:
    """Where the answer to the prompt with this seed would end by itself: log-normal, at least 1.

    Args:
        median: in tokens.
        sigma: the standard deviation of the length's logarithm; 0 makes all answers equally long.
    """
    uniform = (_mixed(seed ^ _LENGTH_STREAM) + 0.5) / 2.0**64
    # The open interval: of the largest 64-bit numbers the float rounds up to 1.
    standard = NormalDist().inv_cdf(min(uniform, 1 - 2.0**-53))
    return max(1, min(LONGEST_ANSWER_TOKENS, round(median * math.exp(min(sigma * standard, 700.0)))))


def _mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
