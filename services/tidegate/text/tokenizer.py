"""Text to token ids and back, for one model's vocabulary.

Special (control) tokens are kept out of the byte-pair encoder: the encoder never makes one from text, and they
come into a prompt only where the caller says that the text is a template's (`allow_special=True`). So what a
user writes cannot open or close a message, whatever it contains.

Every token has bytes; a character may be spread over several tokens, which is why bytes and not strings are the
unit here. The incremental side is detokenizer.py.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import tokenizers

CHARACTER_LIMIT: Final = 4 * 1024 * 1024
"""The longest text that is encoded, in characters; far past any context, it bounds the time of one call (about
two seconds for a million letters without a space, the worst case)."""

_LONG_TEXT_CHARACTERS: Final = 2048
"""From here on the encoder's batch call, which keeps no offsets, is the faster one."""


class Tokenizer:
    """One model's tokenizer; immutable and safe to share between threads.

    Args:
        encoder: a byte-pair encoder that knows the vocabulary but none of the special tokens.
        special_tokens: text of each special token and its id.
        bytes_of_token: the bytes that an ordinary token adds to a text, by id.
        vocabulary_size: ids run from 0 to this, exclusive.
        longest_token_bytes: no token stands for more bytes of text than this.
        prefix_token_ids: what stands before every plain text prompt (a beginning-of-sequence token, or nothing).
    """

    def __init__(
        self,
        encoder: tokenizers.Tokenizer,
        special_tokens: Mapping[str, int],
        bytes_of_token: Callable[[int], bytes],
        vocabulary_size: int,
        longest_token_bytes: int,
        prefix_token_ids: Sequence[int] = (),
    ) -> None:
        self.special_tokens: Final[Mapping[str, int]] = dict(special_tokens)
        self.vocabulary_size: Final = vocabulary_size
        self.longest_token_bytes: Final = longest_token_bytes
        self.prefix_token_ids: Final = tuple(prefix_token_ids)
        self._encoder = encoder
        self._special_ids = frozenset(self.special_tokens.values())
        self._special_names = {token_id: text.encode() for text, token_id in self.special_tokens.items()}
        self._bytes_of_token = bytes_of_token
        self._bytes: list[bytes | None] = [None] * vocabulary_size
        self._special_pattern = special_pattern(self.special_tokens)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """The token ids of a text; special tokens arise only with allow_special, which is for templates' text.

        Raises:
            ValueError: the text is longer than CHARACTER_LIMIT, or is not valid Unicode.
        """
        if len(text) > CHARACTER_LIMIT:
            raise ValueError(f"the text has {len(text)} characters; the most is {CHARACTER_LIMIT}")
        if not allow_special:
            return self._encode_plain(text)
        token_ids: list[int] = []
        for piece in self.split_special(text):
            if isinstance(piece, int):
                token_ids.append(piece)
            else:
                token_ids += self._encode_plain(piece)
        return token_ids

    def least_token_count(self, text: str) -> int:
        """A number of tokens that the text has at least, told at once: the encoder takes seconds for megabytes."""
        return len(text.encode()) // self.longest_token_bytes

    def split_special(self, text: str) -> Iterable[str | int]:
        """The text cut at its special tokens: their ids, and the non-empty texts between, in order."""
        if self._special_pattern is None:
            if text:
                yield text
            return
        position = 0
        for match in self._special_pattern.finditer(text):
            if match.start() > position:
                yield text[position : match.start()]
            yield self.special_tokens[match.group()]
            position = match.end()
        if position < len(text):
            yield text[position:]

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which has no text of its own."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for special tokens and for ids without a meaning."""
        if not 0 <= token_id < self.vocabulary_size:
            return b""
        known = self._bytes[token_id]
        if known is None:
            known = b"" if token_id in self._special_ids else self._bytes_of_token(token_id)
            self._bytes[token_id] = known
        return known

    def token_label(self, token_id: int) -> bytes:
        """What to show for a token in a list of log-probabilities: its bytes, or a special token's name."""
        return self._special_names.get(token_id) or self.token_bytes(token_id)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of the tokens: special ones left out, impossible bytes as U+FFFD, a cut last character dropped."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(b"".join(map(self.token_bytes, token_ids)))

    def _encode_plain(self, text: str) -> list[int]:
        token_ids = self._ids(text)
        if self._special_ids.isdisjoint(token_ids):
            return token_ids
        return [piece for token_id in token_ids for piece in self._without_special(token_id)]

    def _without_special(self, token_id: int) -> Iterable[int]:
        """A vocabulary whose merges lead to a special token's text is told letter by letter instead."""
        if token_id not in self._special_ids:
            return (token_id,)
        letters = self._special_names[token_id].decode()
        return [i for letter in letters for i in self._ids(letter) if i not in self._special_ids]

    def _ids(self, text: str) -> list[int]:
        if len(text) < _LONG_TEXT_CHARACTERS:
            return self._encoder.encode(text, add_special_tokens=False).ids
        return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids


def special_pattern(special_texts: Iterable[str]) -> re.Pattern[str] | None:
    """Finds any of the texts, the longest first; None when there are none."""
    ordered = sorted((text for text in special_texts if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(rest)})
    return alphabet
