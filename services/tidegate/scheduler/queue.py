"""Where requests wait for their placement: the dispatcher, with futures and timers around it.

Each waiting request has one future. It ends with a placement, or with the error that the client is told; a waiter
that is cancelled leaves its lane at once, and gives back a credit that had just been given to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from tidegate.common.errors import TidegateError
from tidegate.scheduler.admission import deadline_passed, latest_start
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.lanes import Waiting
from tidegate.scheduler.placement import Placement
from tidegate.scheduler.request import Request

Clock = Callable[[], float]


class Queue:
    """The one place where requests and credits meet, on one event loop.

    Args:
        clock: monotonic seconds.
        on_change: called after what waits has changed, to tell the replicas the new demand.
        following: entered for each request that has to wait, and left as the wait ends.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        clock: Clock,
        on_change: Callable[[], None],
        following: Callable[[Request, Waiting], AbstractContextManager[None]] = lambda request, waiting: nullcontext(),
    ) -> None:
        self._following = following
        self.dispatcher = dispatcher
        self._clock = clock
        self._on_change = on_change
        self._futures: dict[Waiting, asyncio.Future[Placement]] = {}

    async def wait(self, request: Request) -> Placement:
        """Waits for the request's placement; at once, where a credit is in hand and nothing waits before it.

        Raises:
            TidegateError: DEADLINE_EXCEEDED, or what `refuse_all` was given.
        """
        now = self._clock()
        waiting = waiting_of(request, now)
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._futures[waiting] = future
        self.dispatcher.add(waiting)
        self.match()
        if future.done():
            return future.result()
        self._on_change()
        with self._following(request, waiting):
            return await self._wait_for(request, waiting, future)

    def match(self) -> None:
        """Gives the credits in hand to what waits; called when either has grown."""
        while matched := self.dispatcher.match(self._clock()):
            for waiting, placement in matched:
                self._hand_over(waiting, placement)
            self._on_change()

    def put_back(self, placement: Placement) -> None:
        """Takes back the credit of a request that left after it was placed; the next one gets it."""
        self.dispatcher.put_back(placement)
        self.match()

    def refuse_all(self, error_of: Callable[[], TidegateError]) -> None:
        """Ends the wait of all with an error, each with its own."""
        for waiting in list(self.dispatcher.lanes):
            self._leave(waiting, error_of())

    def _hand_over(self, waiting: Waiting, placement: Placement) -> None:
        future = self._futures.pop(waiting)
        if future.cancelled():
            # Its waiter is cancelled already and has not run since; another turn of `match` finds the credit.
            self.dispatcher.put_back(placement)
        else:
            future.set_result(placement)

    async def _wait_for(self, request: Request, waiting: Waiting, future: asyncio.Future[Placement]) -> Placement:
        left_seconds = waiting.deadline - self._clock()
        timer = asyncio.get_running_loop().call_later(max(0.0, left_seconds), self._expire, request, waiting)
        try:
            placement = await future
        except asyncio.CancelledError:
            self._abandon(waiting, future)
            raise
        finally:
            timer.cancel()
            request.queue_seconds = self._clock() - waiting.since
        return placement

    def _expire(self, request: Request, waiting: Waiting) -> None:
        if waiting in self._futures:
            self._leave(waiting, deadline_passed(request, self._clock()))

    def _leave(self, waiting: Waiting, error: TidegateError) -> None:
        self.dispatcher.leave(waiting, self._clock())
        future = self._futures.pop(waiting)
        if not future.cancelled():
            future.set_exception(error)
        self._on_change()

    def _abandon(self, waiting: Waiting, future: asyncio.Future[Placement]) -> None:
        if waiting in self._futures:
            del self._futures[waiting]
            self.dispatcher.leave(waiting, self._clock())
            self._on_change()
        elif not future.cancelled() and future.exception() is None:
            self.put_back(future.result())


def waiting_of(request: Request, now: float) -> Waiting:
    """The place of a request that begins to wait."""
    return Waiting(
        request_id=request.request_id,
        service_class=request.service_class,
        token_count=request.token_count,
        answer_token_count=request.answer_token_count,
        byte_count=request.body_byte_count,
        since=now,
        deadline=latest_start(request, now),
        tenant=request.tenant,
        cost=request.cost,
        expected_seconds=request.expected_seconds,
        retry_count=request.retry_count,
        block_hashes=request.block_hashes,
    )
