"""The scheduler's door to preprocess: one long-lived stream for all prompts.

A prompt that is not prepared in time, or that comes while the stream is down, is None: the request goes on with an
estimate, and the model service prepares the prompt itself. All who wait learn of a broken stream at once.
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
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        in_flight_limit: int,
        timeout_seconds: float,
        circuit: Circuit,
        clock: Callable[[], float],
    ) -> None:
        self._stub = preprocess_pb2_grpc.PreprocessStub(channel)
        self._in_flight_limit = in_flight_limit
        self._timeout_seconds = timeout_seconds
        self._circuit = circuit
        self._clock = clock
        self._answers: dict[str, asyncio.Future[_Answer | None]] = {}
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

    async def prepare(self, kind: preprocess_pb2.BodyKind.ValueType, body: bytes, tenant: str) -> Prepared | None:
        """The prepared prompt, or None when there is none in time.

        Raises:
            TidegateError: the input is bad, and what is wrong with it.
        """
        if not self.is_reachable or len(self._answers) >= self._in_flight_limit or self._outgoing.full():
            return None
        self._next_id += 1
        request_id = str(self._next_id)
        answer: asyncio.Future[_Answer | None] = asyncio.get_running_loop().create_future()
        self._answers[request_id] = answer
        self._outgoing.put_nowait(
            preprocess_pb2.PrepareRequest(request_id=request_id, body_kind=kind, body=body, tenant=tenant)
        )
        timer = asyncio.get_running_loop().call_later(self._timeout_seconds, self._time_out, request_id)
        try:
            response = await answer
        finally:
            timer.cancel()
            self._answers.pop(request_id, None)
        if response is None:
            return None
        if response.WhichOneof("outcome") == "error":
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
        for answer in self._answers.values():
            _set(answer, None)
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
        self._circuit.succeed()
        answer = self._answers.get(response.request_id)
        if answer is not None:
            _set(answer, response)

    def _time_out(self, request_id: str) -> None:
        self._circuit.fail(f"no answer within {self._timeout_seconds} s", self._clock())
        answer = self._answers.get(request_id)
        if answer is not None:
            _set(answer, None)


def _set(answer: asyncio.Future[_Answer | None], value: _Answer | None) -> None:
    if not answer.done():
        answer.set_result(value)
