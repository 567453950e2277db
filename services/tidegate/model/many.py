"""GenerateMany: each prompt of a stream is a Generate of its own through the mesh listener, so that it is scheduled.

Bounds: at most `limit` answers under way on a stream (past it no request is read), one event of each waiting to be
written, `write_seconds` for the client to take one. A client that goes away ends all of its answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog

from tidegate.common.errors import Reason, TidegateError, to_status
from tidegate.common.remote_errors import from_rpc_error
from tidegate.v1 import inference_pb2, inference_pb2_grpc

log = structlog.get_logger()

Write = Callable[[inference_pb2.GenerateEvent], Awaitable[None]]


class ManyAnswers:
    """The answers of one stream.

    Args:
        write: writes one event to the client; called by one answer at a time.
        limit: answers under way at once.
        write_seconds: how long the client may leave one event unread.
        metadata: goes with each call.
        remaining_seconds: what the client's own deadline leaves; None for none.
    """

    def __init__(
        self,
        stub: inference_pb2_grpc.InferenceStub,
        write: Write,
        *,
        limit: int,
        write_seconds: float,
        metadata: Sequence[tuple[str, str]],
        remaining_seconds: Callable[[], float | None],
    ) -> None:
        self._stub = stub
        self._write = write
        self._limit = limit
        self._write_seconds = write_seconds
        self._metadata = tuple(metadata)
        self._remaining_seconds = remaining_seconds
        self._places = asyncio.Semaphore(limit)
        self._writing = asyncio.Lock()
        self._under_way: set[str] = set()

    async def run(self, requests: AsyncIterator[inference_pb2.GenerateRequest]) -> None:
        """Answers all requests; returns after the last answer, or when the client has left.

        Raises:
            TidegateError: the client does not read.
        """
        reads = True
        try:
            async with asyncio.TaskGroup() as answers:
                await self._places.acquire()
                async for request in requests:
                    answers.create_task(self._answer(request))
                    await self._places.acquire()
        except* _Left:
            log.debug("many_client_left")
        except* _DoesNotRead:
            reads = False
        if not reads:
            raise TidegateError(
                Reason.DEADLINE_EXCEEDED, f"The client left an event unread for {self._write_seconds:g} s."
            )

    async def _answer(self, request: inference_pb2.GenerateRequest) -> None:
        request_id = request.request_id
        is_new = bool(request_id) and request_id not in self._under_way
        try:
            if not is_new:
                raise _id_error(request_id)
            self._under_way.add(request_id)
            await self._relay(request)
        except TidegateError as error:
            finished = inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_ERROR, error=to_status(error))
            await self._send(inference_pb2.GenerateEvent(request_id=request_id, finished=finished))
        finally:
            if is_new:
                self._under_way.discard(request_id)
            self._places.release()

    async def _relay(self, request: inference_pb2.GenerateRequest) -> None:
        call: Any = self._stub.Generate(request, metadata=self._metadata, timeout=self._remaining_seconds())
        try:
            async for event in call:
                # The id is the client's here, whatever the mesh calls the request.
                event.request_id = request.request_id
                await self._send(event)
                if event.HasField("finished"):
                    return
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
        raise TidegateError(Reason.REPLICA_UNAVAILABLE, "The replica's stream ended without a last event.")

    async def _send(self, event: inference_pb2.GenerateEvent) -> None:
        async with self._writing:
            try:
                async with asyncio.timeout(self._write_seconds):
                    await self._write(event)
            except TimeoutError:
                raise _DoesNotRead from None
            except grpc.aio.BaseError as error:
                raise _Left from error


class _Left(Exception):
    """The client is gone: what is left to say has no reader."""


class _DoesNotRead(Exception):
    """The client left an event unread for too long."""


def _id_error(request_id: str) -> TidegateError:
    if not request_id:
        return TidegateError(
            Reason.MISSING_REQUIRED_PARAMETER, "Missing required parameter: request_id.", field="request_id"
        )
    return TidegateError(
        Reason.INVALID_VALUE, f"The request_id '{request_id}' is already under way on this stream.", field="request_id"
    )
