"""The Python client: generates text over gRPC, obeys refusals, and resumes a stream that broke.

A refusal that says when to come back is waited for and tried again, within the caller's own time limit. A stream
that breaks after its first token is asked for again with the tokens that came, so the caller sees a pause.
Source of the retry rules: the statuses and metadata that `tidegate.common.errors` writes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from tidegate.common.grpc_clients import open_channel
from tidegate.common.headers import QUEUE_STATUS
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

RESUME_LIMIT: Final = 3
"""How often one stream is resumed before its error is the caller's."""

RETRY_LIMIT: Final = 5
"""How often one refused request is tried again."""

BROKEN: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL})
"""What gRPC calls a lost connection and a reset stream; without a reason of the mesh they are nobody's answer."""


_STATUS_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class RequestFailed(Exception):
    """The mesh did not answer as asked.

    Attributes:
        status: the gRPC status code.
        reason: the mesh's reason word (SERVER_IS_OVERLOADED, ...); empty where the failure is not the mesh's own.
        retry_after_seconds: when to try again; None where that makes no sense.
    """

    def __init__(self, status: grpc.StatusCode, message: str, reason: str, retry_after_seconds: float | None) -> None:
        super().__init__(f"{reason or status.name}: {message}")
        self.status = status
        self.message = message
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class AsyncClient:
    """Talks to one mesh.

    Args:
        address: host:port of the ingress.
        api_key: sent as a bearer token; None sends none.
        retries: whether refusals that name a time are waited for.
    """

    def __init__(self, address: str, *, api_key: str | None = None, retries: bool = True) -> None:
        self._channel = open_channel(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        self._retries = retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all streams and the connection."""
        await self._channel.close()

    async def generate(
        self, request: pb.GenerateRequest, *, timeout_seconds: float | None = None, queue_status: bool = False
    ) -> AsyncIterator[pb.GenerateEvent]:
        """Yields one `started`, the deltas and one `finished`; resumes and retries are not seen.

        Args:
            queue_status: yields `queued` events, too, while the request waits for its turn.

        Raises:
            RequestFailed: refused for good, or failed.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        answer = _Answer(request)
        metadata = [*self._metadata, (QUEUE_STATUS, "stream")] if queue_status else self._metadata
        resumes = retries = 0
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            call = self._stub.Generate(answer.next_request(), timeout=remaining, metadata=metadata)
            try:
                async for event in call:
                    refusal = answer.refusal(event)
                    if refusal is not None:
                        failure = refusal
                        break
                    if answer.take(event):
                        yield event
                else:
                    return
            except grpc.aio.AioRpcError as error:
                failure = failure_of(error)
            finally:
                # A caller that leaves ends the work at once, not when the call happens to be collected.
                call.cancel()
            if answer.tokens and not failure.reason and failure.status in BROKEN:
                resumes += 1
                if resumes > RESUME_LIMIT:
                    raise failure
                continue
            wait = failure.retry_after_seconds
            late = deadline is not None and wait is not None and time.monotonic() + wait >= deadline
            retries += 1
            if not self._retries or wait is None or late or retries > RETRY_LIMIT:
                raise failure
            await asyncio.sleep(wait)


class Client:
    """The same for callers without an event loop; one call at a time."""

    def __init__(self, address: str, *, api_key: str | None = None, retries: bool = True) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(_opened(address, api_key, retries))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._loop.run_until_complete(self._client.close())
        self._loop.close()

    def generate(
        self, request: pb.GenerateRequest, *, timeout_seconds: float | None = None, queue_status: bool = False
    ) -> Iterator[pb.GenerateEvent]:
        """As AsyncClient.generate; leaving the loop early cancels the request."""
        events = self._client.generate(request, timeout_seconds=timeout_seconds, queue_status=queue_status)
        try:
            while True:
                try:
                    yield self._loop.run_until_complete(events.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run_until_complete(events.aclose())  # type: ignore[attr-defined]


def chat_request(messages: Sequence[tuple[str, str]], **fields: Any) -> pb.GenerateRequest:
    """A request from (role, content) pairs; `fields` are GenerateRequest's own."""
    chat = pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])
    return pb.GenerateRequest(chat=chat, **fields)


def failure_of(error: grpc.aio.AioRpcError) -> RequestFailed:
    """What a failed call says, with the reason and the time to come back where it has them."""
    reason, wait = "", None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            reason, wait = _details(status_pb2.Status.FromString(value))
    return RequestFailed(error.code(), error.details() or "", reason, wait)


def failure_of_status(status: status_pb2.Status) -> RequestFailed:
    """What the status of a `finished` event with reason ERROR says."""
    codes = {code.value[0]: code for code in grpc.StatusCode}
    reason, wait = _details(status)
    return RequestFailed(codes.get(status.code, grpc.StatusCode.UNKNOWN), status.message, reason, wait)


def _details(status: status_pb2.Status) -> tuple[str, float | None]:
    reason, wait = "", None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            wait = _seconds(retry.retry_delay)
    return reason, wait


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


async def _opened(address: str, api_key: str | None, retries: bool) -> AsyncClient:
    return AsyncClient(address, api_key=api_key, retries=retries)


class _Answer:
    """What came so far of one answer, and the request that asks for the rest."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._started = False
        self._queued = False
        self._model = request.model
        self.tokens: list[int] = list(request.resume.token_ids)

    def next_request(self) -> pb.GenerateRequest:
        if len(self.tokens) == len(self._request.resume.token_ids):
            return self._request
        resumed = pb.GenerateRequest()
        resumed.CopyFrom(self._request)
        resumed.model = self._model  # Tokens mean something to the model that made them only.
        resumed.resume.token_ids[:] = self.tokens
        return resumed

    def refusal(self, event: pb.GenerateEvent) -> RequestFailed | None:
        """What a request was refused with while it waited: the status of such a stream was spent on its place."""
        if not self._queued or not event.HasField("finished") or event.finished.reason != pb.FINISH_REASON_ERROR:
            return None
        error = event.finished.error
        return RequestFailed(_STATUS_CODES[error.code], error.message, *_details(error))

    def take(self, event: pb.GenerateEvent) -> bool:
        """Notes the event; False for a second `started`, which the caller must not see."""
        self._queued = event.HasField("queued")
        if event.HasField("delta"):
            self.tokens.extend(event.delta.token_ids)
        if event.HasField("started"):
            self._model = event.started.model
            first, self._started = not self._started, True
            return first
        return True
