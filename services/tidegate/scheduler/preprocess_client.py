"""The scheduler's door to preprocess: one long-lived stream for all prompts.

A prompt that is not prepared in time, or that comes while the stream is down, is None: the request goes on with an
estimate, and the model service prepares the prompt itself. A request that would only wait elsewhere waits here a
little longer, but never past its deadline: under a burst the work is then done once, and not again by the model
services. All who wait learn of a broken stream at once. What preprocess gets wrong by itself counts as no answer.

Tokens that no replica will read are given back over the same stream, at the next chance: best effort, for their
leases run out by themselves.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Final

import grpc
import structlog

from tidegate.common.errors import Reason, TidegateError, from_refusal
from tidegate.scheduler.circuit import Circuit
from tidegate.v1 import errors_pb2, preprocess_pb2, preprocess_pb2_grpc, tensor_pb2

log = structlog.get_logger()

FIRST_BACKOFF_SECONDS: Final = 0.1
LONGEST_BACKOFF_SECONDS: Final = 1.0

RELEASE_LIMIT: Final = 16_384
"""The most tokens that wait to be given back; of more, the oldest are left to their leases."""

RELEASES_PER_MESSAGE: Final = 1_024
"""As preprocess.proto promises."""

FIRST_FAULT_STATUS: Final = 500
"""The HTTP statuses from here on are the fault of a service, those below of the client."""

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
        self._releases: deque[tensor_pb2.SharedMemoryHandle] = deque(maxlen=RELEASE_LIMIT)
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
        self,
        kind: preprocess_pb2.BodyKind.ValueType,
        body: bytes,
        tenant: str,
        *,
        deadline: float | None,
        can_dispatch: Callable[[], bool],
    ) -> Prepared | None:
        """The prepared prompt, or None when there is none in time, or preprocess failed at it.

        Args:
            deadline: when it is too late for any answer; None: never.
            can_dispatch: whether the request would be dispatched now if it went on; asked when time is up.

        Raises:
            TidegateError: the input is bad, and what is wrong with it; or DEADLINE_EXCEEDED.
        """
        if not self.is_reachable or len(self._pending) >= self._in_flight_limit or self._outgoing.full():
            return None
        self._next_id += 1
        request_id = str(self._next_id)
        pending = _Pending(can_dispatch, deadline, since=self._clock())
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

    def release(self, tokens: tensor_pb2.Tensor) -> None:
        """Gives tokens back that nobody will read."""
        if tokens.HasField("shared_memory"):
            self._releases.append(tokens.shared_memory)
            self._wake_writer()

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
        self._wake_writer()
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
                request = await self._outgoing.get()
                count = min(len(self._releases), RELEASES_PER_MESSAGE)
                request.releases.extend(self._releases.popleft() for _ in range(count))
                await call.write(request)
                del request
                self._wake_writer()
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            # The reader of the same stream says why it ended.
            return

    def _wake_writer(self) -> None:
        """Sees to it that releases go with the next prompt, or without one."""
        if self._releases and self.is_connected and self._outgoing.empty():
            self._outgoing.put_nowait(preprocess_pb2.PrepareRequest())

    def _receive(self, response: _Answer) -> None:
        pending = self._pending.get(response.request_id)
        if response.HasField("error") and _is_fault(response.error):
            self._circuit.fail(response.error.message, self._clock())
            if pending is not None:
                pending.set(None)
            return
        if self._circuit.last_error:
            log.info("preprocess_answers")
        self._circuit.succeed()
        if pending is not None and not pending.answer.done():
            pending.set(response)
        elif response.HasField("prepared"):
            self.release(response.prepared.tokens)

    def _set_timer(self, pending: _Pending) -> None:
        seconds = self._timeout_seconds
        if pending.deadline is not None:
            seconds = min(seconds, max(0.0, pending.deadline - self._clock()))
        pending.timer = asyncio.get_running_loop().call_later(seconds, self._time_out, pending)

    def _time_out(self, pending: _Pending) -> None:
        now = self._clock()
        waited_seconds = now - pending.since
        is_late = pending.deadline is not None and now >= pending.deadline
        if not is_late and waited_seconds < self._patience_seconds and not pending.can_dispatch():
            self._set_timer(pending)
            return
        if waited_seconds >= self._timeout_seconds:
            self._circuit.fail("no answer in time", now)
        if is_late:
            message = f"The deadline passed after {waited_seconds:.1f} s in the preparation of the prompt"
            pending.fail(TidegateError(Reason.DEADLINE_EXCEEDED, message))
        else:
            pending.set(None)


class _Pending:
    """A prompt that was sent and not answered."""

    def __init__(self, can_dispatch: Callable[[], bool], deadline: float | None, *, since: float) -> None:
        self.answer: asyncio.Future[_Answer | None] = asyncio.get_running_loop().create_future()
        self.can_dispatch = can_dispatch
        self.deadline = deadline
        self.since = since
        self.timer: asyncio.TimerHandle | None = None

    def set(self, value: _Answer | None) -> None:
        """Answers, if nobody has."""
        if not self.answer.done():
            self.answer.set_result(value)

    def fail(self, error: TidegateError) -> None:
        """Refuses, if nobody has answered."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def end(self) -> None:
        """Stops the clock."""
        if self.timer is not None:
            self.timer.cancel()


def _is_fault(refusal: errors_pb2.Refusal) -> bool:
    """Whether a refusal says nothing about the request: the model service may well prepare the prompt."""
    surface = from_refusal(refusal).surface
    return surface.retryable or surface.http_status >= FIRST_FAULT_STATUS
