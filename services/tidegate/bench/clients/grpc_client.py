"""gRPC streams by grpc.aio, over several connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc

from tidegate.bench.clients import messages
from tidegate.bench.clients.answer import CLASS_HEADER, Answer, Ask
from tidegate.bench.ledger import Ending
from tidegate.bench.targets import Target
from tidegate.client import failure_of
from tidegate.common.grpc_clients import CHANNEL_OPTIONS

CONNECT_SECONDS: Final = 10.0

_OPTIONS: Final = (*CHANNEL_OPTIONS, ("grpc.max_concurrent_streams", 1_000_000))


class GrpcClient:
    """tidegate.v1.Inference/Generate.

    Args:
        clock: what the answers' times are taken from.
    """

    wants_text = False

    def __init__(self, target: Target, clock: Callable[[], float]) -> None:
        self._target = target
        self._clock = clock
        self._keys = {tenant: (("authorization", f"Bearer {key}"),) for tenant, key in target.api_keys.items()}
        self._channels: list[grpc.aio.Channel] = []
        self._calls: list[Any] = []
        self._next = 0

    async def start(self) -> None:
        """Connects all channels."""
        self._channels = [
            grpc.aio.insecure_channel(self._target.address, options=_OPTIONS)
            for _ in range(self._target.connection_count)
        ]
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        except TimeoutError:
            await self.close()
            raise OSError(f"{self._target.address} does not answer within {CONNECT_SECONDS:.0f} s") from None
        # Bytes both ways: the messages are made and read here, without a wrapper of grpc's around each.
        self._calls = [channel.unary_stream(messages.METHOD) for channel in self._channels]

    async def ask(self, ask: Ask, answer: Answer) -> None:
        """One stream to its end."""
        self._next += 1
        call = self._calls[self._next % len(self._calls)](
            messages.encoded(ask, self._target.model),
            timeout=ask.timeout_seconds,
            metadata=((CLASS_HEADER, ask.service_class), *self._keys.get(ask.tenant, ())),
        )
        try:
            async for message in call:
                messages.note(message, answer, self._clock)
            if answer.ending is None:
                answer.fail("the stream ended without its last event")
        except grpc.aio.AioRpcError as error:
            _note_error(error, answer)
        finally:
            if not call.done():
                call.cancel()

    async def close(self) -> None:
        """Ends all connections."""
        for channel in self._channels:
            await channel.close()


def _note_error(error: grpc.aio.AioRpcError, answer: Answer) -> None:
    failure = failure_of(error)
    for key, value in (*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())):
        if key == "x-request-id":
            answer.request_id = str(value)
    if failure.reason:
        answer.refuse(failure.reason, failure.retry_after_seconds, failure.message)
    elif failure.status is grpc.StatusCode.DEADLINE_EXCEEDED:
        answer.ending = Ending.DEADLINE_EXCEEDED
    elif failure.status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        answer.refuse(failure.status.name, failure.retry_after_seconds, failure.message)
    else:
        answer.fail(f"{failure.status.name}: {failure.message}")
