"""The scheduler's door to the cache: asks whether an answer is known. Whatever goes wrong is a miss."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from tidegate.scheduler.circuit import Circuit
from tidegate.v1 import cache_pb2, cache_pb2_grpc


class CacheClient:
    """Looks answers up, within a time budget.

    Args:
        timeout_seconds: how long a look-up may take.
    """

    def __init__(
        self, channel: grpc.aio.Channel, *, timeout_seconds: float, circuit: Circuit, clock: Callable[[], float]
    ) -> None:
        self._stub = cache_pb2_grpc.CacheStub(channel)
        self._timeout_seconds = timeout_seconds
        self._circuit = circuit
        self._clock = clock

    @property
    def is_reachable(self) -> bool:
        """Whether it is asked now."""
        return not self._circuit.is_open(self._clock())

    @property
    def last_error(self) -> str:
        """What was last wrong; empty: nothing."""
        return self._circuit.last_error

    async def knows(self, answer_key: bytes, tenant: str) -> bool:
        """Whether the cache would replay this answer; False for an empty key, and when it does not say so in time."""
        if not answer_key or not self.is_reachable:
            return False
        request = cache_pb2.LookUpRequest(answer_key=answer_key, tenant=tenant)
        try:
            response = await self._stub.LookUp(request, timeout=self._timeout_seconds)
        except grpc.aio.AioRpcError as error:
            self._circuit.fail(error.details() or error.code().name, self._clock())
            return False
        self._circuit.succeed()
        return response.hit
