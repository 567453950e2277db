"""The model service's one door to Triton: a multiplexed stream that mends itself.

Owns the connection, the subscription whose responses carry what the engine's steps gave all of our sequences, and
the buffers between the stream and whoever reads `generate`. Invariants:

- `ready` is true exactly while a subscription is open on a Triton whose engine answers.
- Every `generate` ends with an output that has a finish reason, with EngineRefused before any output, or with
  TritonGone; a Triton that is killed ends them as soon as its connection closes, one that hangs after
  `silence_seconds`.
- A `generate` that is closed early sends `cancel` at once and gives its buffer up.
- A reader that is slow gets its outputs merged; a sequence buffers no more than its own max_tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final, TypeVar

import grpc
import structlog
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidegate.common.grpc_clients import open_channel
from tidegate.model.triton_messages import (
    ENGINE_UNAVAILABLE,
    ERROR,
    ArenaSlice,
    EngineLoad,
    EngineOutput,
    EngineRequest,
    Message,
    command_message,
    generate_message,
    is_final,
    merged,
    parse_bundle,
    parse_load,
    parse_output,
    subscribe_message,
)

__all__ = [
    "ArenaSlice",
    "ArenaUnavailable",
    "EngineLoad",
    "EngineOutput",
    "EngineRefused",
    "EngineRequest",
    "TritonClient",
    "TritonGone",
]

MAX_LIVE_SEQUENCES: Final = 65_536
"""Sequences under way at once; no engine is set up for more."""

MAX_UNSENT_MESSAGES: Final = 2048
"""Requests that Triton has not taken yet; more than that means it does not read."""

HEARTBEAT_SECONDS: Final = 0.5
"""How long the stream may be silent before the engine is asked for its load."""

SILENCE_SECONDS: Final = 2.5
"""How long the stream may be silent in all; past this the server hangs, or the engine in it is dead."""

UNARY_SECONDS: Final = 1.0
"""How long a question beside the stream may take."""

FIRST_BACKOFF_SECONDS: Final = 0.05
LONGEST_BACKOFF_SECONDS: Final = 1.0

QUEUE_FULL: Final = "QUEUE_FULL"
ARENA_UNAVAILABLE: Final = "ARENA_UNAVAILABLE"
TRITON_ERROR: Final = "TRITON_ERROR"

# What Triton says of a Python model whose process has died; it does not restart it.
_DEAD_STUB: Final = "is not healthy"

_LOAD_PREFIX: Final = "load#"

_log = structlog.get_logger()

_Parsed = TypeVar("_Parsed")


class TritonGone(Exception):
    """Triton, or the engine in it, cannot go on with this sequence; another replica can."""


class EngineRefused(Exception):
    """The engine did not take a request.

    Args:
        reason: the engine's reason word (QUEUE_FULL, CONTEXT_LENGTH_EXCEEDED, INVALID_VALUE, DUPLICATE_ID,
            ENGINE_FAILED, NON_FINITE_LOGITS), ARENA_UNAVAILABLE, or TRITON_ERROR for one of Triton's own.
        message: one sentence for a person.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class ArenaUnavailable(Exception):
    """Triton cannot map the region, because it is not there or Triton is not; it is tried again by itself."""


class TritonClient:
    """One Triton server's model, over one stream."""

    def __init__(
        self,
        address: str,
        model_name: str = "llm",
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self.address = address
        self.model_name = model_name
        self.ready = False
        self.latest_load: EngineLoad | None = None
        self.on_load: list[Callable[[EngineLoad], None]] = []
        self.on_ready: list[Callable[[bool], None]] = []
        self.on_fault: list[Callable[[BaseException], None]] = []
        self._heartbeat_seconds = heartbeat_seconds
        self._silence_seconds = silence_seconds
        self._became_ready = asyncio.Event()
        self._name = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._arenas: dict[str, int] = {}
        self._registered_arenas: set[str] = set()
        self._sequences: dict[str, _Sequence] = {}
        self._load_waiters: dict[str, asyncio.Future[EngineLoad]] = {}
        self._unsent: asyncio.Queue[Message] = asyncio.Queue()
        self._subscription = ""
        self._heard_count = 0
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to connect; returns at once."""
        assert self._keeper is None
        self._channel = open_channel(self.address)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._keeper = asyncio.create_task(self._keep_connected(), name=f"triton-{self.address}")
        self._keeper.add_done_callback(self._tell_fault)

    async def close(self) -> None:
        """Ends the stream; sequences that are under way end with TritonGone."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    async def wait_ready(self, timeout_seconds: float) -> bool:
        """Waits until the model is ready; false where it is not in time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._became_ready.wait(), timeout_seconds)
        return self.ready

    async def model_is_ready(self) -> bool:
        """Whether Triton has loaded the model and the engine in it answers."""
        try:
            await self.load()
        except (TritonGone, EngineRefused):
            return False
        return True

    async def load(self) -> EngineLoad:
        """Asks the engine how full it is; TritonGone where no answer comes."""
        if not self.ready:
            raise TritonGone(f"Triton at {self.address} is not ready")
        message_id = self._ask_load()
        waiter = self._load_waiters[message_id] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(waiter, self._silence_seconds)
        except TimeoutError as error:
            raise TritonGone(f"Triton at {self.address} does not answer") from error
        finally:
            self._load_waiters.pop(message_id, None)

    async def register_arena(self, region: str, byte_count: int) -> None:
        """Lets Triton read a shared-memory region, now and after each reconnect.

        Raises:
            ArenaUnavailable: not now; a request with a slice of it is refused until it works.
        """
        self._arenas[region] = byte_count
        self._registered_arenas.discard(region)
        if not self.ready:
            raise ArenaUnavailable(f"Triton at {self.address} is not ready")
        await self._register(region)

    def arena_is_registered(self, region: str) -> bool:
        """Whether a request may use a slice of the region."""
        return region in self._registered_arenas

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Runs one sequence; each output has at least one token or a finish reason. Close it to cancel.

        Raises:
            EngineRefused: before any output.
            TritonGone: at any time.
        """
        sequence = self._begin(request)
        began = False
        try:
            while True:
                output = await sequence.take()
                if output.finish_reason == ERROR:
                    _raise_if_fatal(output.error, refused=not began and not output.token_ids)
                began = True
                yield output
                if output.finish_reason:
                    return
        finally:
            self._end(sequence)

    def _begin(self, request: EngineRequest) -> _Sequence:
        if not self.ready:
            raise TritonGone(f"Triton at {self.address} is not ready")
        if isinstance(request.tokens, ArenaSlice) and request.tokens.region not in self._registered_arenas:
            raise EngineRefused(ARENA_UNAVAILABLE, f"Triton has not mapped {request.tokens.region!r}")
        if len(self._sequences) >= MAX_LIVE_SEQUENCES or self._unsent.qsize() >= MAX_UNSENT_MESSAGES:
            raise EngineRefused(QUEUE_FULL, f"{len(self._sequences)} sequences are under way")
        # A request may come again with the same id, from here or from our next life, before its first run is dropped.
        sequence = _Sequence(f"{request.request_id}#{self._name}.{next(self._numbers)}")
        # Log-probabilities do not travel in the subscription's responses.
        subscription = self._subscription if request.logprobs is None else None
        self._unsent.put_nowait(generate_message(self.model_name, request, sequence.sequence_id, subscription))
        self._sequences[sequence.sequence_id] = sequence
        return sequence

    def _end(self, sequence: _Sequence) -> None:
        if self._sequences.pop(sequence.sequence_id, None) is not None and not sequence.finished:
            message_id = f"cancel#{next(self._numbers)}"
            self._unsent.put_nowait(command_message(self.model_name, "cancel", message_id, sequence.sequence_id))

    async def _keep_connected(self) -> None:
        backoff_seconds = FIRST_BACKOFF_SECONDS
        try:
            while True:
                was_ready = False
                try:
                    await self._run_stream()
                except _Lost as lost:
                    was_ready = self.ready
                    self._lose(str(lost))
                backoff_seconds = FIRST_BACKOFF_SECONDS if was_ready else backoff_seconds
                await asyncio.sleep(backoff_seconds)
                backoff_seconds = min(backoff_seconds * 2, LONGEST_BACKOFF_SECONDS)
        finally:
            self._lose("the client is closed")

    def _tell_fault(self, keeper: asyncio.Task[None]) -> None:
        fault = None if keeper.cancelled() else keeper.exception()
        if fault is not None:
            for listener in self.on_fault:
                listener(fault)

    async def _run_stream(self) -> None:
        """Connects, and carries messages until the connection is lost, which always raises _Lost."""
        await self._check_model()
        await self._register_missing()
        self._unsent = asyncio.Queue()
        self._subscription = f"subscription#{self._name}.{next(self._numbers)}"
        self._unsent.put_nowait(subscribe_message(self.model_name, self._subscription))
        call = self._stub.ModelStreamInfer(_messages(self._unsent))
        # Mapping takes its own time: it must not hold up the heart, which counts the server's silence.
        mapping = asyncio.create_task(self._keep_registered())
        heart = asyncio.create_task(self._beat(call))
        try:
            async for message in call:
                self._heard_count += 1
                self._take(message)
            raise _Lost("Triton ended the stream")
        except grpc.aio.AioRpcError as error:
            raise _Lost(f"{error.code().name}: {error.details()}") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _Lost(f"it has been silent for {self._silence_seconds:g} s") from None
        finally:
            heart.cancel()
            mapping.cancel()
            call.cancel()

    async def _beat(self, call: Any) -> None:
        """Asks for a sign of life when the stream is silent, and ends the call where none comes."""
        interval_seconds = self._heartbeat_seconds / 2
        silence_seconds = 0.0
        while silence_seconds <= self._silence_seconds:
            heard_count = self._heard_count
            await asyncio.sleep(interval_seconds)
            # An event loop that stands still counts one interval: then it is we who do not hear.
            silence_seconds = silence_seconds + interval_seconds if heard_count == self._heard_count else 0.0
            if silence_seconds >= self._heartbeat_seconds and self._unsent.empty():
                self._ask_load()
        call.cancel()

    def _ask_load(self) -> str:
        """Sends the question; the answer comes by the id that this gives."""
        message_id = f"{_LOAD_PREFIX}{next(self._numbers)}"
        self._unsent.put_nowait(command_message(self.model_name, "load", message_id))
        return message_id

    async def _keep_registered(self) -> None:
        """Maps the regions that were not there before."""
        while True:
            await asyncio.sleep(self._heartbeat_seconds / 2)
            await self._register_missing()

    def _take(self, message: Message) -> None:
        """Gives one message of the stream to whom it is for; one for nobody is a late word of a cancelled one."""
        response = message.infer_response
        message_id = response.id
        if message.error_message:
            self._take_error(message_id, message.error_message)
        elif message_id == self._subscription:
            self._take_bundle(response)
        elif (sequence := self._sequences.get(message_id)) is not None:
            output = _parsed(parse_output, response)
            self._show_load(output.load)
            sequence.put(output)
        elif message_id.startswith(_LOAD_PREFIX):
            self._take_load(message_id, response)

    def _take_bundle(self, response: Message) -> None:
        bundle = _parsed(parse_bundle, response)
        for sequence_id, output in bundle.outputs:
            sequence = self._sequences.get(sequence_id)
            if sequence is not None:
                sequence.put(output)
            if output.error.startswith(ENGINE_UNAVAILABLE):
                raise _Lost(output.error)
        if bundle.error or is_final(response):
            raise _Lost(bundle.error or "the engine ended the subscription")
        self._show_load(bundle.load)
        if not self.ready:
            _log.info("triton_ready", address=self.address)
            self._set_ready(True)

    def _take_load(self, message_id: str, response: Message) -> None:
        error = _parsed(parse_output, response).error
        if error:
            raise _Lost(error)
        load = _parsed(parse_load, response)
        self._show_load(load)
        waiter = self._load_waiters.get(message_id)
        if load is not None and waiter is not None and not waiter.done():
            waiter.set_result(load)

    def _take_error(self, message_id: str, error: str) -> None:
        # That a question for the load fails may be all that is heard of it when Triton has unloaded the model.
        if message_id == self._subscription or message_id.startswith(_LOAD_PREFIX) or _DEAD_STUB in error:
            raise _Lost(error)
        sequence = self._sequences.get(message_id)
        if sequence is not None:
            sequence.put(EngineOutput(token_ids=[], finish_reason=ERROR, error=f"{TRITON_ERROR}: {error}"))

    def _show_load(self, load: EngineLoad | None) -> None:
        if load is not None:
            self.latest_load = load
            for listener in self.on_load:
                listener(load)

    def _set_ready(self, ready: bool) -> None:
        self.ready = ready
        (self._became_ready.set if ready else self._became_ready.clear)()
        for listener in self.on_ready:
            listener(ready)

    def _lose(self, why: str) -> None:
        """Ends everything that was on the stream."""
        gone = TritonGone(f"Triton at {self.address} is gone: {why}")
        if self.ready:
            _log.info("triton_gone", address=self.address, why=why, sequences=len(self._sequences))
            self._set_ready(False)
        self._registered_arenas.clear()
        sequences, self._sequences = self._sequences, {}
        for sequence in sequences.values():
            sequence.fail(gone)
        for waiter in self._load_waiters.values():
            if not waiter.done():
                waiter.set_exception(gone)

    async def _check_model(self) -> None:
        try:
            request = service_pb2.ModelReadyRequest(name=self.model_name)
            if (await self._stub.ModelReady(request, timeout=UNARY_SECONDS)).ready:
                return
        except grpc.aio.AioRpcError as error:
            raise _Lost(f"{error.code().name}: {error.details()}") from error
        raise _Lost(f"Triton has not loaded {self.model_name}")

    async def _register_missing(self) -> None:
        for region in self._arenas.keys() - self._registered_arenas:
            with contextlib.suppress(ArenaUnavailable):
                await self._register(region)

    async def _register(self, region: str) -> None:
        """Maps a region afresh: a mapping that Triton has may be of a region that was removed since."""
        byte_count = self._arenas[region]
        register = service_pb2.SystemSharedMemoryRegisterRequest(
            name=region, key=f"/{region}", offset=0, byte_size=byte_count
        )
        try:
            unregister = service_pb2.SystemSharedMemoryUnregisterRequest(name=region)
            await self._stub.SystemSharedMemoryUnregister(unregister, timeout=UNARY_SECONDS)
            await self._stub.SystemSharedMemoryRegister(register, timeout=UNARY_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise ArenaUnavailable(f"Triton cannot map {region!r}: {error.details()}") from error
        self._registered_arenas.add(region)


class _Sequence:
    """What came for one sequence and is not read yet."""

    __slots__ = ("_error", "_pending", "_waiter", "finished", "sequence_id")

    def __init__(self, sequence_id: str) -> None:
        self.sequence_id = sequence_id
        self.finished = False
        self._pending: list[EngineOutput] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: EngineOutput) -> None:
        """Adds an output; the last one finishes the sequence."""
        self._pending.append(output)
        self.finished = bool(output.finish_reason)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends the sequence, after what came before."""
        self._error = error
        self._wake()

    async def take(self) -> EngineOutput:
        """Waits for something, and gives all of it as one output."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._pending = self._pending, []
        return merged(outputs)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Lost(Exception):
    """The stream is of no use any more."""


async def _messages(unsent: asyncio.Queue[Message]) -> AsyncIterator[Message]:
    while True:
        yield await unsent.get()


def _parsed(parse: Callable[[Message], _Parsed], response: Message) -> _Parsed:
    """A response as it is read; after one that makes no sense nothing on the stream can be trusted."""
    try:
        return parse(response)
    except Exception as error:
        _log.exception("triton_response_unreadable", response_id=response.id)
        raise _Lost(f"a response cannot be read: {error!r}") from error


def _raise_if_fatal(error: str, *, refused: bool) -> None:
    """Raises what an error output means, unless it is to be passed on as the sequence's end."""
    reason, _, message = error.partition(": ")
    if reason == ENGINE_UNAVAILABLE:
        raise TritonGone(message)
    if refused:
        raise EngineRefused(reason, message)
