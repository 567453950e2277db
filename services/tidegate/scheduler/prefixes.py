"""Which replica probably holds the beginning of a prompt: what was sent there lately. Pure.

A block's hash is chained, so it stands for the whole prompt up to its end. Each replica's hashes are kept in the order
of their use, at most `limit` of them; the one that was used longest ago is forgotten, as the engine would do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixMemory:
    """The block hashes of prompts sent to each replica.

    Args:
        limit: hashes a replica; 0 remembers nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[str, OrderedDict[int, None]] = {}

    def remember(self, address: str, block_hashes: Sequence[int]) -> None:
        """A prompt of these blocks, first block first, was sent there."""
        known = self._known.setdefault(address, OrderedDict())
        # Last block first, so that a prompt's beginning, which others share, is forgotten last.
        for block_hash in reversed(block_hashes[: self._limit]):
            known[block_hash] = None
            known.move_to_end(block_hash)
        while len(known) > self._limit:
            known.popitem(last=False)

    def share(self, address: str, block_hashes: Sequence[int]) -> float:
        """The share of the prompt's blocks, from its beginning, that are probably there: 0 to 1."""
        known = self._known.get(address)
        if not known or not block_hashes:
            return 0.0
        for index, block_hash in enumerate(block_hashes):
            if block_hash not in known:
                return index / len(block_hashes)
        return 1.0

    def keep(self, addresses: set[str]) -> None:
        """Forgets the replicas that are not among these."""
        for address in self._known.keys() - addresses:
            del self._known[address]
