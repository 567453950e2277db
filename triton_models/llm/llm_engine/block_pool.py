"""The free list of KV blocks.

Owns which block is free. Invariants: a block is free or taken, never both; `free_count` and
`taken_count` add up to `block_count`; a block is handed out to one owner at a time. What lies in a
block, and who its owner is, it leaves to others. The idea of paging the KV cache is from
PagedAttention (Kwon et al., SOSP 2023).
"""


class BlockPool:
    """Hands out blocks by number, the most recently returned first, since it is warm in the caches."""

    def __init__(self, block_count: int, block_token_count: int) -> None:
        assert block_count > 0 and block_token_count > 0
        self.block_count = block_count
        self.block_token_count = block_token_count
        self._free = list(range(block_count - 1, -1, -1))
        self._taken = bytearray(block_count)

    @property
    def free_count(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    @property
    def taken_count(self) -> int:
        """Blocks that someone owns."""
        return self.block_count - len(self._free)

    def blocks_for(self, token_count: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-token_count // self.block_token_count)

    def can_take(self, count: int) -> bool:
        """Whether so many blocks are free."""
        return 0 <= count <= len(self._free)

    def take(self, count: int) -> list[int]:
        """Take blocks; asking for more than are free is a mistake of the caller."""
        assert self.can_take(count), (count, len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._taken[block] = 1
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks, in the reverse order, so that the next owner gets them as they were."""
        for block in reversed(blocks):
            assert self._taken[block], f"block {block} is free already"
            self._taken[block] = 0
            self._free.append(block)
