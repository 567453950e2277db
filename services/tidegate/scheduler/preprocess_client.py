"""The scheduler's door to preprocess: one long-lived stream for all prompts.

A prompt that is not prepared in time, or that comes while the stream is down, is None: the request goes on with an
estimate, and the model service prepares the prompt itself. A request that would only wait elsewhere waits here a
little longer: under a burst the work is then done once, and not again by the model services. All who wait learn of
a broken stream at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

import grpc
import structlog

from tidegate.common.errors import from_refusal
from tidegate.scheduler.circuit import Circuit
from tidegate.v1 import preprocess_pb2, preprocess_pb2_grpc

log = structlog.get_logger()

FIRST_BACKOFF_SECONDS: Final = 0.1
LONGEST_BACKOFF_SECONDS: Final = 1.0

Prepared = preprocess_pb2.PreparedPrompt
_Answer = preprocess_pb2.PrepareResponse


class PreprocessClient:
    """Prepares prompts over the stream; `run` keeps it up.

    Args:
        in_flight_limit: the most prompts at once; one more is None at once.
        timeout_seconds: how long a prompt may take.
        patience_seconds: how long it may take while its request could not be dispatched anyway.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        in_flight_limit: int,
        timeout_seconds: float,
        patience_seconds: float,
        circuit: Circuit,
        clock: Callable[[], float],
    ) -> None:
        self._stub = preprocess_pb2_grpc.PreprocessStub(channel)
        self._in_flight_limit = in_flight_limit
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._circuit = circuit
        self._clock = clock
        self._pending: dict[str, _Pending] = {}
        self._outgoing: asyncio.Queue[preprocess_pb2.PrepareRequest] = asyncio.Queue(in_flight_limit)
        self._next_id = 0
        self.is_connected = False

    @property
    def is_reachable(self) -> bool:
        """Whether prompts are sent there now."""
        return self.is_connected and not self._circuit.is_open(self._clock())

    @property
    def last_error(self) -> str:
        """What was last wrong; empty: nothing."""
        return self._circuit.last_error

    async def prepare(
        self, kind: preprocess_pb2.BodyKind.ValueType, body: bytes, tenant: str, *, can_dispatch: Callable[[], bool]
    ) -> Prepared | None:
        """The prepared prompt, or None when there is none in time.

        Args:
            can_dispatch: whether the request would be dispatched now if it went on; asked when time is up.

        Raises:
            TidegateError: the input is bad, and what is wrong with it.
        """
        if not self.is_reachable or len(self._pending) >= self._in_flight_limit or self._outgoing.full():
            return None
        self._next_id += 1
        request_id = str(self._next_id)
        pending = _Pending(can_dispatch, patient_until=self._clock() + self._patience_seconds)
        self._pending[request_id] = pending
        self._outgoing.put_nowait(
            preprocess_pb2.PrepareRequest(request_id=request_id, body_kind=kind, body=body, tenant=tenant)
        )
        self._set_timer(pending)
        try:
            response = await pending.answer
        finally:
            pending.end()
            del self._pending[request_id]
        if response is None or response.WhichOneof("outcome") is None:
            return None
        if response.HasField("error"):
            raise from_refusal(response.error)
        return response.prepared

    async def run(self) -> None:
        """Keeps the stream up until cancelled."""
        backoff_seconds = FIRST_BACKOFF_SECONDS
        while True:
            began = self._clock()
            error = await self._converse()
            self._disconnect(error)
            if self._clock() - began > LONGEST_BACKOFF_SECONDS:
                backoff_seconds = FIRST_BACKOFF_SECONDS
            await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))
            backoff_seconds = min(backoff_seconds * 2, LONGEST_BACKOFF_SECONDS)

    async def _converse(self) -> str:
        """One stream, from its opening to its end; returns why it ended."""
        call = self._stub.Prepare()
        writer = asyncio.create_task(self._write(call))
        # Until it breaks the stream counts as up: one that does not come up breaks within milliseconds, and all who
        # wait learn of it then.
        self.is_connected = True
        try:
            async for response in call:
                self._receive(response)
            return "the service ended the stream"
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        finally:
            writer.cancel()
            call.cancel()

    def _disconnect(self, error: str) -> None:
        if error != self._circuit.last_error:
            log.warning("preprocess_disconnected", error=error)
        self.is_connected = False
        self._circuit.last_error = error
        for pending in self._pending.values():
            pending.set(None)
        while not self._outgoing.empty():
            self._outgoing.get_nowait()

    async def _write(self, call: grpc.aio.StreamStreamCall[preprocess_pb2.PrepareRequest, _Answer]) -> None:
        try:
            while True:
                await call.write(await self._outgoing.get())
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            # The reader of the same stream says why it ended.
            return

    def _receive(self, response: _Answer) -> None:
        if self._circuit.last_error:
            log.info("preprocess_answers")
        self._circuit.succeed()
        pending = self._pending.get(response.request_id)
        if pending is not None:
            pending.set(response)

    def _set_timer(self, pending: _Pending) -> None:
        pending.timer = asyncio.get_running_loop().call_later(self._timeout_seconds, self._time_out, pending)

    def _time_out(self, pending: _Pending) -> None:
        now = self._clock()
        if now < pending.patient_until and not pending.can_dispatch():
            self._set_timer(pending)
            return
        self._circuit.fail("no answer in time", now)
        pending.set(None)


class _Pending:
    """A prompt that was sent and not answered."""

    def __init__(self, can_dispatch: Callable[[], bool], *, patient_until: float) -> None:
        self.answer: asyncio.Future[_Answer | None] = asyncio.get_running_loop().create_future()
        self.can_dispatch = can_dispatch
        self.patient_until = patient_until
        self.timer: asyncio.TimerHandle | None = None

    def set(self, value: _Answer | None) -> None:
        """Answers, if nobody has."""
        if not self.answer.done():
            self.answer.set_result(value)

    def end(self) -> None:
        """Stops the clock."""
        if self.timer is not None:
            self.timer.cancel()
