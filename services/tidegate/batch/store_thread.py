"""The one thread that uses the store: acts happen one after the other, and the event loop waits for none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tidegate.batch.store import Store

_Answer = TypeVar("_Answer")


class StoreThread:
    """Takes acts on the store.

    An act that was taken happens, even if who asked for it is cancelled while waiting.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def do(self, act: Callable[[Store], _Answer]) -> _Answer:
        """Does it, after those before it, and answers what it answers."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, act, self._store)

    async def close(self) -> None:
        """Ends the thread after its last act, and the use of the database."""
        await self.do(Store.close)
        self._executor.shutdown(wait=False)
