"""How much of one stream may be under way: a bound on requests and one on their bytes."""

from __future__ import annotations

import asyncio


class Window:
    """Admits requests while both bounds hold. One reader enters; anybody leaves.

    Args:
        request_limit: the most requests inside.
        byte_limit: the most bytes inside; a single larger one enters when it is alone.
    """

    def __init__(self, request_limit: int, byte_limit: int) -> None:
        self._request_limit = request_limit
        self._byte_limit = byte_limit
        self._left = asyncio.Event()
        self.request_count = 0
        self.byte_count = 0

    async def enter(self, byte_count: int) -> None:
        """Waits until there is room, and takes it."""
        while not self.has_room(byte_count):
            self._left.clear()
            await self._left.wait()
        self.request_count += 1
        self.byte_count += byte_count

    def has_room(self, byte_count: int) -> bool:
        """Whether so many bytes would enter at once."""
        if self.request_count >= self._request_limit:
            return False
        return self.request_count == 0 or self.byte_count + byte_count <= self._byte_limit

    def leave(self, byte_count: int) -> None:
        """Gives back what one request took."""
        self.request_count -= 1
        self.byte_count -= byte_count
        self._left.set()
