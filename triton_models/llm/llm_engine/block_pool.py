"""Which KV blocks are free, who shares one, and what is known of those that hold a prompt's beginning.

Owns the counts of owners, and the cache of known blocks. Invariants: a block is free or taken, never both, and
`free_count` and `taken_count` add up to `block_count`; a taken block has one owner or more, and only a known one has
more; a known block's contents never change, so nobody writes to a block that is shared; a key belongs to one block,
and a block to one key at most. A known block without owners counts as free, and is kept until a block is wanted and
no other is free: the one that was used longest ago then goes first. What lies in a block, and who its owners are, it
leaves to others. Paging is from PagedAttention (Kwon et al., SOSP 2023), and so are blocks that are found by a hash of
what they hold.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out blocks by number, of those that hold nothing known the lowest first.

    What is read together so lies together, also after many sequences have come and gone.
    """

    def __init__(self, block_count: int, block_token_count: int) -> None:
        assert block_count > 0 and block_token_count > 0
        self.block_count = block_count
        self.block_token_count = block_token_count
        self._free = list(range(block_count))
        self._owner_counts = [0] * block_count
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Known blocks without owners, the one that goes first at the front."""

    @property
    def free_count(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def taken_count(self) -> int:
        """Blocks that someone owns."""
        return self.block_count - self.free_count

    @property
    def known_count(self) -> int:
        """Blocks that can be found by what they hold, taken or free."""
        return len(self._block_of)

    def blocks_for(self, token_count: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-token_count // self.block_token_count)

    def can_take(self, count: int) -> bool:
        """Whether so many blocks are free."""
        return 0 <= count <= self.free_count

    def take(self, count: int) -> list[int]:
        """Take blocks; asking for more than are free is a mistake of the caller."""
        assert self.can_take(count), (count, self.free_count)
        taken = [heapq.heappop(self._free) if self._free else self._forget_oldest() for _ in range(count)]
        for block in taken:
            self._owner_counts[block] = 1
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The known blocks of the first keys, up to one that is not known."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Become one more owner of known blocks."""
        for block in blocks:
            assert block in self._key_of, f"block {block} is not known"
            self._owner_counts[block] += 1
            self._idle.pop(block, None)

    def is_shared(self, block: int) -> bool:
        """Whether it has more than one owner."""
        return self._owner_counts[block] > 1

    def is_taken(self, block: int) -> bool:
        """Whether it has an owner."""
        return self._owner_counts[block] > 0

    def know(self, block: int, key: bytes) -> None:
        """Let a taken block be found; where another one holds the same, or it is known already, nothing changes."""
        assert self.is_taken(block)
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Let blocks be found no more."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            if block in self._idle:
                del self._idle[block]
                heapq.heappush(self._free, block)

    def freed_by(self, owners: Iterable[Sequence[int]]) -> int:
        """How many blocks would be free if these owners gave theirs back."""
        given = Counter(block for blocks in owners for block in blocks)
        return sum(count == self._owner_counts[block] for block, count in given.items())

    def give_back(self, blocks: Sequence[int]) -> None:
        """Return blocks, in the reverse order: of known ones the end of a text goes before its beginning."""
        for block in reversed(blocks):
            assert self._owner_counts[block], f"block {block} is free already"
            self._owner_counts[block] -= 1
            if self._owner_counts[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                heapq.heappush(self._free, block)

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
