"""The gate that every line passes on its way out: as many at once as are allowed, in turns between tenants.

Invariants: lines in flight never pass what was allowed when the last of them began; during a pause none begins.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tidegate.batch.turns import Turns
from tidegate.batch.verdicts import Pauses


class Gate:
    """Lets lines out. Closed until somebody allows something.

    Args:
        pauses: how long to wait after a refusal.
        clock: monotonic seconds.
    """

    def __init__(self, pauses: Pauses, clock: Callable[[], float] = time.monotonic) -> None:
        self.allowed = 0
        self._pauses = pauses
        self._clock = clock
        self._turns = Turns()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._wanted = asyncio.Event()
        self._paused_until = 0.0
        self._tenants_paused_until: dict[str, float] = {}

    @property
    def in_flight(self) -> int:
        """Lines that went out and have not come back."""
        return self._turns.in_flight

    @property
    def is_wanted(self) -> bool:
        """Whether a line waits or is out."""
        return self._turns.is_wanted or self._turns.in_flight > 0

    async def wait_wanted(self) -> None:
        """Returns when a line waits or is out."""
        while not self.is_wanted:
            self._wanted.clear()
            await self._wanted.wait()

    def allow(self, count: int) -> None:
        """How many may be out from now on; those that are stay."""
        self.allowed = count
        self._let_out()

    def pause(self, retry_after_seconds: float | None, *, tenant: str | None = None) -> float:
        """A refusal came: nobody goes out for a while, or nobody of one tenant; answers for how long, in seconds.

        Those that come during a pause speak of lines that went out before it, so they do not lengthen it.
        """
        now = self._clock()
        until = self._paused_until if tenant is None else self._tenants_paused_until.get(tenant, 0.0)
        if now < until:
            return until - now
        seconds = self._pauses.next_seconds(retry_after_seconds)
        if tenant is None:
            self._paused_until = now + seconds
        else:
            self._tenants_paused_until[tenant] = now + seconds
        asyncio.get_running_loop().call_later(seconds, self._let_out)
        return seconds

    def found_room(self) -> None:
        """An attempt was not refused: the next refusal's pause is short again."""
        self._pauses.reset()

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Waits for the tenant's turn; the line is out until the end of the block."""
        await self._take(tenant)
        try:
            yield
        finally:
            self._give_back(tenant)

    async def _take(self, tenant: str) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(place)
        self._turns.want(tenant)
        self._wanted.set()
        self._let_out()
        try:
            await place
        except asyncio.CancelledError:
            if place in self._waiting.get(tenant, ()):
                self._leave(tenant, place)
            elif not place.cancelled():
                self._give_back(tenant)
            raise

    def _give_back(self, tenant: str) -> None:
        self._turns.end(tenant)
        self._let_out()

    def _leave(self, tenant: str, place: asyncio.Future[None]) -> None:
        self._waiting[tenant].remove(place)
        self._turns.unwant(tenant)
        self._tidy(tenant)

    def _let_out(self) -> None:
        now = self._clock()
        if now < self._paused_until:
            return
        self._tenants_paused_until = {name: until for name, until in self._tenants_paused_until.items() if now < until}
        paused = frozenset(self._tenants_paused_until)
        while self._turns.in_flight < self.allowed:
            tenant = self._turns.next(without=paused)
            if tenant is None:
                return
            place = self._waiting[tenant].popleft()
            if place.cancelled():  # Its task has not noticed yet.
                self._turns.unwant(tenant)
            else:
                self._turns.begin(tenant)
                place.set_result(None)
            self._tidy(tenant)

    def _tidy(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]
