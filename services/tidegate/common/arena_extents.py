"""Which bytes of a fixed range are free: the arithmetic of the arena, without the memory.

Invariants: free extents are in order, never overlap and never touch (neighbours are merged); every offset and
length is a multiple of the alignment; taken and free bytes add up to the range.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import chain
from typing import Final

ALIGNMENT_BYTES: Final = 64
"""A cache line: no two leases share one, and every element type is aligned."""


class FreeExtents:
    """The free extents of a range, taken next-fit.

    Next-fit goes around the range like a ring. Leases end roughly in the order in which they began, so the place
    behind the last one is nearly always free, and a long search is rare.

    Args:
        begin, end: the range in bytes, both aligned.
    """

    def __init__(self, begin: int, end: int) -> None:
        assert begin % ALIGNMENT_BYTES == 0 and end % ALIGNMENT_BYTES == 0 and begin < end
        self._offsets = [begin]
        self._lengths = [end - begin]
        self._cursor = begin
        self.free_byte_count = end - begin

    def take(self, byte_count: int) -> int | None:
        """Takes so many bytes, rounded up to the alignment; returns their offset, or None when no extent has them."""
        wanted = aligned(byte_count)
        count = len(self._offsets)
        first = bisect_left(self._offsets, self._cursor)
        for index in chain(range(first, count), range(first)):
            if self._lengths[index] >= wanted:
                return self._cut(index, self._offsets[index], wanted)
        return None

    def take_at(self, offset: int, byte_count: int) -> bool:
        """Takes exactly these bytes, as when a table of leases is read back; False when they are not all free."""
        wanted = aligned(byte_count)
        index = bisect_left(self._offsets, offset + 1) - 1
        if index < 0 or offset % ALIGNMENT_BYTES or offset + wanted > self._offsets[index] + self._lengths[index]:
            return False
        self._cut(index, offset, wanted)
        return True

    def give(self, offset: int, byte_count: int) -> None:
        """Gives back what was taken, and merges it with its free neighbours."""
        length = aligned(byte_count)
        self.free_byte_count += length
        index = bisect_left(self._offsets, offset)
        if index < len(self._offsets) and offset + length == self._offsets[index]:
            length += self._lengths[index]
            self._remove(index)
        if index > 0 and self._offsets[index - 1] + self._lengths[index - 1] == offset:
            self._lengths[index - 1] += length
        else:
            self._insert(index, offset, length)

    def extents(self) -> list[tuple[int, int]]:
        """The free extents as (offset, byte count), in order."""
        return list(zip(self._offsets, self._lengths, strict=True))

    def _cut(self, index: int, offset: int, wanted: int) -> int:
        begin, length = self._offsets[index], self._lengths[index]
        self._remove(index)
        if begin + length > offset + wanted:
            self._insert(index, offset + wanted, begin + length - offset - wanted)
        if begin < offset:
            self._insert(index, begin, offset - begin)
        self._cursor = offset + wanted
        self.free_byte_count -= wanted
        return offset

    def _insert(self, index: int, offset: int, length: int) -> None:
        self._offsets.insert(index, offset)
        self._lengths.insert(index, length)

    def _remove(self, index: int) -> None:
        del self._offsets[index], self._lengths[index]


def aligned(byte_count: int) -> int:
    """The bytes that a lease of so many bytes occupies."""
    return -(-byte_count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
