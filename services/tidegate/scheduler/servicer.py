"""Envoy's external processing: messages to plain calls and back. It decides nothing.

One stream a request: its headers, then its body in one piece; each is answered, and the stream ends with the last
answer, so that a request that has left costs nothing here. While a request is held, its stream is read too: a
client that leaves ends it, by a reset or by a mere end of Envoy's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final

import grpc
import structlog
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc

from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError
from tidegate.scheduler import envoy_messages
from tidegate.scheduler.outcomes import Outcome, Outcomes
from tidegate.scheduler.pipeline import PASS_THROUGH, Decision, Pipeline
from tidegate.scheduler.request import Request, request_from_headers

log = structlog.get_logger()

UNWATCHED_SECONDS: Final = 0.05
"""A decision that comes sooner needs nobody to watch the stream's end, and Envoy no word that it takes longer."""

LEFT_SECONDS: Final = 5.0
LEFT_LOOKS: Final = 12
"""gRPC notices a stream that was reset soon after its reader does. Of twenty thousand at once it does after ten seconds
and more, and then the event loop is late, too; so it is waited for in steps. Of a stream that has merely ended it
notices nothing, and Envoy resets such a stream by itself after a second."""

Context = grpc.aio.ServicerContext[ext_proc.ProcessingRequest, ext_proc.ProcessingResponse]


class ExternalProcessor(ext_proc_grpc.ExternalProcessorServicer):
    """Serves Envoy's ext_proc filter, request phases only."""

    def __init__(
        self,
        pipeline: Pipeline,
        outcomes: Outcomes,
        clock: Callable[[], float],
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline = pipeline
        self._outcomes = outcomes
        self._clock = clock
        self._unix_seconds = unix_seconds

    async def Process(self, request_iterator: AsyncIterator[Any], context: Context) -> None:
        """Takes one request from its headers to its decision."""
        first = await context.read()
        if first is grpc.aio.EOF or not first.HasField("request_headers"):
            return
        fields = envoy_messages.header_fields(first.request_headers)
        now, unix_now = self._clock(), self._unix_seconds()
        request = request_from_headers(fields, now - envoy_messages.delay_seconds(fields, headers.ARRIVED, unix_now))
        if headers.WHOLE in fields:
            request.whole_at = now - envoy_messages.delay_seconds(fields, headers.WHOLE, unix_now)
        if headers.REPLICA in fields or not self._pipeline.takes(request):
            # Somebody in the mesh has decided already, or it is not ours: the end of the stream lets it go on.
            await context.write(envoy_messages.CONTINUE_HEADERS)
            return
        self._outcomes.receive()
        exchange = _Exchange(context, in_headers=first.request_headers.end_of_stream)
        try:
            await self._account(request, exchange)
        except _ClientLeft:
            # A status that gRPC cannot send stays in memory for ever. So it is to notice first, and to cancel this.
            for _ in range(LEFT_LOOKS):
                await asyncio.sleep(LEFT_SECONDS)

    async def _account(self, request: Request, exchange: _Exchange) -> None:
        """Answers, and sees to it that the request ends in exactly one outcome.

        Raises:
            _ClientLeft: there is nobody to answer.
        """
        outcome, refusal = Outcome.ABANDONED, None
        try:
            try:
                outcome = await self._answer(request, exchange)
            except TidegateError as error:
                # Said before it is sent: Envoy ends the stream with this message, at times before the write returns.
                outcome, refusal = Outcome.REFUSED, error
                await exchange.write(envoy_messages.refuse(error, request))
        except _ClientLeft:
            raise
        except Exception:
            # A fault of ours costs this request its placement, not its answer: Envoy balances it by itself.
            log.exception("decision_failed", request_id=request.request_id)
            outcome = Outcome.PASSED_THROUGH
        finally:
            self._outcomes.end(request, outcome, self._clock(), refusal)
            if outcome is not Outcome.DISPATCHED:
                self._pipeline.release(request)

    async def _answer(self, request: Request, exchange: _Exchange) -> Outcome:
        self._pipeline.admit_headers(request)
        body = await exchange.body(self._pipeline.body_wait_seconds)
        with exchange.watched(lambda: envoy_messages.hold(self._pipeline.hold_seconds(request))):
            is_ours = await self._pipeline.prepare(request, body)
            # From here on Envoy alone keeps the body: thousands of them may wait.
            del body
            decision = await self._pipeline.place(request) if is_ours else PASS_THROUGH
        await self._tell(decision, exchange)
        return _outcome(decision)

    async def _tell(self, decision: Decision, exchange: _Exchange) -> None:
        try:
            await exchange.write(envoy_messages.go_on(decision, in_headers=exchange.in_headers))
        except BaseException:
            self._pipeline.undo(decision)
            raise


class _ClientLeft(Exception):
    """The client of the request is gone, and Envoy's stream with it."""


class _Exchange:
    """One ext_proc stream after its first message; `in_headers` where the request has headers only."""

    def __init__(self, context: Context, *, in_headers: bool) -> None:
        self.in_headers = in_headers
        self._context = context
        self._is_watched = False
        self._has_ended = False
        self._holding: asyncio.Task[None] | None = None

    async def body(self, wait_seconds: float) -> bytes:
        """The request's body, after its headers were let go on; empty where the headers are all there is.

        Raises:
            TidegateError: INVALID_HTTP, the body was not there in time.
        """
        if self.in_headers:
            return b""
        await self.write(envoy_messages.CONTINUE_HEADERS)
        try:
            async with asyncio.timeout(wait_seconds):
                message = await self._context.read()
        except TimeoutError:
            text = f"The body did not arrive within {wait_seconds:g} s"
            raise TidegateError(Reason.INVALID_HTTP, text) from None
        if message is grpc.aio.EOF or not message.HasField("request_body"):
            raise _ClientLeft
        return bytes(message.request_body.body)

    async def write(self, response: ext_proc.ProcessingResponse) -> None:
        """Sends one message to Envoy."""
        try:
            if self._holding is not None:
                await self._holding
            await self._context.write(response)
        except grpc.aio.BaseError as error:
            raise _ClientLeft from error

    @contextlib.contextmanager
    def watched(self, hold: Callable[[], ext_proc.ProcessingResponse]) -> Iterator[None]:
        """Within, the end of the stream cancels what runs, and becomes _ClientLeft.

        Args:
            hold: makes the message that asks Envoy to wait; sent once, and only where it takes a while.
        """
        task = asyncio.current_task()
        assert task is not None
        self._is_watched = True
        timer = asyncio.get_running_loop().call_later(UNWATCHED_SECONDS, self._watch, task, hold)
        try:
            yield
        except asyncio.CancelledError:
            if not self._has_ended or task.uncancel():
                # gRPC ends this task, perhaps at the same time.
                raise
            raise _ClientLeft from None
        finally:
            self._is_watched = False
            timer.cancel()

    def _watch(self, task: asyncio.Task[None], hold: Callable[[], ext_proc.ProcessingResponse]) -> None:
        self._holding = _spawn(self._ask_to_wait(hold()))
        # Nobody waits for the reader: it ends when the stream does, at the latest after the last answer.
        _spawn(self._read_to_end(task))

    async def _ask_to_wait(self, message: ext_proc.ProcessingResponse) -> None:
        # A stream that has ended says so to its reader.
        with contextlib.suppress(grpc.aio.BaseError):
            await self._context.write(message)

    async def _read_to_end(self, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(grpc.aio.BaseError):
            await self._context.read()
        if self._is_watched:
            self._has_ended = True
            task.cancel()


_tasks: Final[set[asyncio.Task[None]]] = set()
"""The tasks of held streams; the loop itself keeps no strong reference to a task."""


def _spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    _tasks.add(task := asyncio.create_task(work))
    task.add_done_callback(_tasks.discard)
    return task


def _outcome(decision: Decision) -> Outcome:
    if decision.placement is not None:
        return Outcome.DISPATCHED
    passes_through = decision is PASS_THROUGH or decision.lite is not None
    return Outcome.PASSED_THROUGH if passes_through else Outcome.REPLAYED
