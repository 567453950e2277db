"""One request while the engine has it: its tokens, how far they are computed, its blocks.

Invariants: `0 <= computed_token_count < token_count` between steps, since the last token is always
still to be computed; the blocks, in order, hold the keys and values of the first
`computed_token_count` tokens, but for blocks that an attention window hides from the next token, and nothing that
counts behind them. The batcher alone changes `computed_token_count` and `block_ids`; the engine alone appends tokens.
"""

import hashlib
from array import array
from dataclasses import dataclass, field

from .request import SequenceRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's state; two are equal only if they are the same one."""

    request: SequenceRequest
    arrival_index: int
    token_ids: list[int]
    prompt_token_count: int
    seed: int
    stop_token_ids: frozenset[int]
    computed_token_count: int = 0
    block_ids: list[int] = field(default_factory=list)
    cached_token_count: int | None = None
    """Tokens whose keys and values were there when it was first admitted; None before."""
    draft_gain: float = 1.0
    """Right drafts a step of late, and how many tokens it has before it drafts again: `drafts.py`'s."""
    drafts_from: int = 0
    _block_keys: list[bytes] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The client's name for it."""
        return self.request.request_id

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts the most urgent first: by priority, then by arrival."""
        return (self.request.priority, self.arrival_index)

    @property
    def token_count(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.token_ids)

    @property
    def output_token_count(self) -> int:
        """Output tokens so far; also the position of the next one in its random stream."""
        return len(self.token_ids) - self.prompt_token_count

    def block_keys(self, count: int, block_token_count: int) -> list[bytes]:
        """The keys of its first `count` whole blocks: what is in them, after what, and whose.

        A key is a hash of the tokens up to the block's end and of the request's salt, so that no other text, and
        nobody else's, has it.
        """
        for index in range(len(self._block_keys), count):
            before = self._block_keys[-1] if index else hashlib.sha256(self.request.cache_salt.encode()).digest()
            tokens = self.token_ids[index * block_token_count : (index + 1) * block_token_count]
            self._block_keys.append(hashlib.sha256(before + array("q", tokens).tobytes()).digest())
        return self._block_keys[:count]

    @property
    def pending_token_count(self) -> int:
        """Known tokens that are still to be computed."""
        return len(self.token_ids) - self.computed_token_count
