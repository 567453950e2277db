"""The life of one stream in the waiting room: the table of contents.

1. Call the same method again, through the mesh listener: the request is scheduled like any other.
2. Until something is known, say nothing: a refusal is then a plain refusal, and a quick answer is untouched.
3. While it waits, tell its place.
4. With the first event, pass on what comes, message by message: no more than one is held here, so a slow reader
   slows the model service down and nothing else.

Nothing of it outlives the stream: a client that leaves ends the call and the watch at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import grpc

from tidegate.common.errors import Reason, TidegateError
from tidegate.common.remote_errors import from_rpc_error
from tidegate.v1 import scheduler_pb2
from tidegate.waiting.surfaces import Surface

_NOT_PASSED_ON: Final = ("grpc-", "content-type", "x-request-id", "x-envoy-", "date", "server")
"""What the call's own headers say to this process alone. Envoy names the request in each response."""


class Followed(Protocol):
    """What the room needs of a place."""

    status: scheduler_pb2.QueueStatus | None
    changed: asyncio.Event


class Writer(Protocol):
    """The client's side of a stream."""

    async def write(self, message: bytes) -> None:
        """Writes one message; returns when there is room for the next."""

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Opens the response."""


class Stream:
    """One stream.

    Args:
        call: the same call again, to the mesh.
        place: of the request; None where its place is not told.
        least_interval_seconds, longest_silence_seconds: between two statuses, changed or not.
        write_seconds: how long the client may leave one message unread.
        clock: monotonic seconds.
        on_told: called for each status that was written.
    """

    def __init__(
        self,
        client: Writer,
        call: Any,
        surface: Surface,
        place: Followed | None,
        *,
        least_interval_seconds: float,
        longest_silence_seconds: float,
        write_seconds: float,
        clock: Callable[[], float],
        on_told: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._call = call
        self._surface = surface
        self._place = place
        self._least_interval_seconds = least_interval_seconds
        self._longest_silence_seconds = longest_silence_seconds
        self._write_seconds = write_seconds
        self._clock = clock
        self._on_told = on_told
        self.is_open = False
        """Whether anything was written: after that, an error can only be a last message."""
        self.has_answer = False
        """Whether the answer has begun; from then on, its own service ends it, errors included."""

    async def run(self) -> None:
        """Ends with the answer.

        Raises:
            TidegateError: refused before anything was written.
            AioRpcError: the answer broke, on a surface that has a status for it.
            DoesNotRead: the client left a message unread for too long.
        """
        first = asyncio.ensure_future(self._call.read())
        try:
            if self._place is not None:
                await self._wait(first, self._place)
            await self._pass_on(await first)
        except grpc.aio.AioRpcError as error:
            await self._fail(error)
        except TidegateError as error:
            if not self.is_open:
                raise
            await self._write(self._surface.error(error))
        finally:
            first.cancel()
            self._call.cancel()

    async def _wait(self, first: asyncio.Future[Any], place: Followed) -> None:
        """Tells the place until there is something better to read."""
        told_at = self._clock()
        while not first.done():
            await _first_of(first, place.changed, self._longest_silence_seconds - (self._clock() - told_at))
            if first.done():
                return
            place.changed.clear()
            # The place may be lost while the response is being opened.
            status = place.status
            if status is not None:
                if not self.is_open:
                    await self._client.send_initial_metadata(self._surface.opening)
                await self._write(self._surface.queued(status))
                self._on_told()
            told_at = self._clock()
            await asyncio.wait({first}, timeout=self._least_interval_seconds)

    async def _pass_on(self, message: Any) -> None:
        if message is grpc.aio.EOF:
            raise TidegateError(Reason.REPLICA_UNAVAILABLE, "The answer ended before it began.", retry_after_seconds=1)
        if not self.is_open:
            await self._client.send_initial_metadata(await self._metadata())
        while message is not grpc.aio.EOF:
            self.has_answer = True
            await self._write(message)
            message = await self._call.read()

    async def _fail(self, error: grpc.aio.AioRpcError) -> None:
        """Ends the stream with what the call failed with."""
        if self.has_answer and self._surface.ends_with_status:
            # As it came: a client of the mesh takes a broken stream up where it broke.
            raise error
        if not self.is_open:
            raise from_rpc_error(error)
        await self._write(self._surface.error(from_rpc_error(error)))

    async def _metadata(self) -> list[tuple[str, str | bytes]]:
        """What the answer's own service says beside it."""
        found = await self._call.initial_metadata() or ()
        return [(key, value) for key, value in found if not key.startswith(_NOT_PASSED_ON)]

    async def _write(self, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                self.is_open = True
                await self._client.write(message)
        except TimeoutError:
            raise DoesNotRead from None


class DoesNotRead(Exception):
    """The client left a message unread for too long."""


async def _first_of(first: asyncio.Future[Any], changed: asyncio.Event, seconds: float) -> None:
    """Waits for one of them, or until the time is up."""
    change = asyncio.ensure_future(changed.wait())
    try:
        await asyncio.wait({first, change}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    finally:
        change.cancel()
