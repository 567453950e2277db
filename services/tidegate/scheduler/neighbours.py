"""The other schedulers of the mesh, asked about a request that does not wait here.

Schedulers share nothing, so a place in the queue is known only to the one that holds the request. A question about one
goes to all of them at once, and the first that knows it answers; who is asked by another asks nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc

from tidegate.common import headers
from tidegate.common.grpc_clients import open_channel
from tidegate.common.remote_errors import from_rpc_error
from tidegate.v1 import scheduler_pb2, scheduler_pb2_grpc

ASK_SECONDS: Final = 1.0
"""How long the others may take to say where a request stands."""

Statuses = AsyncGenerator[scheduler_pb2.QueueStatus, None]


class Neighbours:
    """Whom this scheduler asks.

    Attributes:
        own_address: host:port of this scheduler, which is left out of the addresses.
    """

    def __init__(self) -> None:
        self.own_address = ""
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """All schedulers that there are now."""
        wanted = {address for address in addresses if address != self.own_address}
        for address in self._channels.keys() - wanted:
            closing = asyncio.ensure_future(self._channels.pop(address).close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for address in wanted - self._channels.keys():
            self._channels[address] = open_channel(address)

    async def close(self) -> None:
        """Ends all connections."""
        self.set_addresses([])
        await asyncio.gather(*self._closing)

    async def status(
        self, request: scheduler_pb2.GetQueueStatusRequest, tenant: str | None
    ) -> scheduler_pb2.QueueStatus | None:
        """Where the request stands with another scheduler; None when it waits with none that answers in time."""

        async def ask(stub: scheduler_pb2_grpc.SchedulerStub) -> scheduler_pb2.QueueStatus | None:
            try:
                found: scheduler_pb2.QueueStatus = await stub.GetQueueStatus(
                    request, metadata=_metadata(tenant), timeout=ASK_SECONDS
                )
                return found
            except grpc.aio.AioRpcError:
                return None

        asked = [asyncio.ensure_future(ask(stub)) for stub in self._stubs()]
        try:
            for each in asyncio.as_completed(asked):
                if (found := await each) is not None:
                    return found
            return None
        finally:
            for one in asked:
                one.cancel()

    async def follow(
        self, own: Statuses, request: scheduler_pb2.WatchQueueStatusRequest, tenant: str | None
    ) -> Statuses:
        """The statuses of the first scheduler that knows the request, this one among them.

        Args:
            own: what this scheduler knows; closed in the end.

        Raises:
            TidegateError: what `own` raised, if nobody knew the request; or that the one who knew it is away.
        """
        streams = [own, *(_followed(stub, request, tenant) for stub in self._stubs())]
        stream, first = await _first_to_speak(streams)
        async with aclosing(stream):
            yield first
            async for status in stream:
                yield status

    def _stubs(self) -> list[scheduler_pb2_grpc.SchedulerStub]:
        return [scheduler_pb2_grpc.SchedulerStub(channel) for channel in self._channels.values()]


async def _followed(
    stub: scheduler_pb2_grpc.SchedulerStub, request: scheduler_pb2.WatchQueueStatusRequest, tenant: str | None
) -> Statuses:
    call: Any = stub.WatchQueueStatus(request, metadata=_metadata(tenant))
    try:
        async for status in call:
            yield status
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    finally:
        call.cancel()


async def _first_to_speak(streams: Sequence[Statuses]) -> tuple[Statuses, scheduler_pb2.QueueStatus]:
    """The stream from which something comes first, and what came; the others are closed.

    Raises:
        TidegateError: what the first of the streams raised, when nothing came from any.
    """
    asked = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    speaking: Statuses | None = None
    pending = set(asked)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                if each.exception() is None:
                    speaking = asked[each]
                    return speaking, each.result()
        raise next(iter(asked)).exception() or AssertionError
    finally:
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        for stream in streams:
            if stream is not speaking:
                await stream.aclose()


def _metadata(tenant: str | None) -> tuple[tuple[str, str], ...]:
    asked = ((headers.ASKED_BY_SCHEDULER, "1"),)
    return asked if tenant is None else ((headers.TENANT, tenant), *asked)
