"""The one thread that calls the engine, the inbox before it, and a thread that compiles grammars before that.

Owns the engine and which channel each sequence answers to. Invariants: nobody who calls `submit` or `cancel` waits
for a step, and no step for a grammar; what is compiled and what is in the inbox are bounded together; every sequence
that was submitted without a refusal ends in exactly one output with a finish reason. A step that raises ends the
sequences that were in the engine, with an error; one that raises EngineBroken, steps that raise again and again, or
cancelling that does, mean a broken engine: it takes nothing more and `on_broken` is told.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from outbox import Channel, Outbox

from llm_engine import EngineBroken, EngineLoad, ModelInfo, RequestRefused, SequenceOutput, SequenceRequest

QUEUE_FULL = "QUEUE_FULL"
DUPLICATE_ID = "DUPLICATE_ID"
ENGINE_FAILED = "ENGINE_FAILED"
ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"

SHUTTING_DOWN = "the engine is shutting down"

MAX_INBOX_COUNT = 1024
"""Requests that wait for their grammar or for the current step to end; the engine's own bound on waiting ones comes
after it."""

MAX_FAILED_STEP_COUNT = 3
"""Steps in a row that may raise before the engine counts as broken: an error of the device stays for good."""


class Engine(Protocol):
    """What this thread, and the model around it, need of an engine; llm_engine.Engine is one."""

    model_info: ModelInfo

    def matcher(self, request: SequenceRequest) -> Any: ...
    def add(self, request: SequenceRequest, matcher: Any = None) -> None: ...
    def cancel(self, request_id: str) -> bool: ...
    def step(self, is_unwanted: Callable[[str], bool]) -> list[SequenceOutput]: ...
    def watch(self, on_broken: Callable[[str], None]) -> None: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def load(self) -> EngineLoad: ...


@dataclass(frozen=True)
class _Arrival:
    """A request for the engine, with what follows its grammar, or what it ends with where that cannot be."""

    request: SequenceRequest
    matcher: Any = None
    end: SequenceOutput | None = None


class EngineThread:
    """Runs the engine's steps; `submit`, `cancel` and `load` are for any thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        on_broken: Callable[[str], None],
        log: Callable[[str], None],
        stream_interval_seconds: float,
        max_inbox_count: int = MAX_INBOX_COUNT,
    ) -> None:
        self._engine = engine
        self._on_broken = on_broken
        self._log = log
        self._max_inbox_count = max_inbox_count
        self._inbox: deque[_Arrival] = deque()
        self._compiling: dict[str, SequenceRequest] = {}
        self._channels: dict[str, Channel] = {}
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()
        self._closing = ""
        self._failed_step_count = 0
        self._step_started: float | None = None
        self.broken = ""
        self.load: EngineLoad = engine.load
        self._outbox = Outbox(self._lose, stream_interval_seconds)
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("engine", self._run), ("grammars", self._compile_all))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: SequenceRequest, channel: Channel) -> None:
        """Hands a request over; RequestRefused where it cannot be taken. A later refusal comes as an output."""
        with self._changed:
            self.require_available()
            if request.request_id in self._channels:
                raise RequestRefused(DUPLICATE_ID, f"request_id {request.request_id!r} is in the engine already")
            if len(self._inbox) + len(self._compiling) >= self._max_inbox_count:
                raise RequestRefused(QUEUE_FULL, f"{self._max_inbox_count} requests wait for the engine's thread")
            self._channels[request.request_id] = channel
            if request.sampling.has_grammar:
                self._compiling[request.request_id] = request
            else:
                self._inbox.append(_Arrival(request))
            self._changed.notify_all()

    def require_available(self) -> None:
        """Raises Unavailable where the engine takes nothing more."""
        if self.broken or self._closing:
            raise Unavailable(self.broken or self._closing)

    def cancel(self, request_id: str) -> bool:
        """Ends a sequence before the next step; False where there is none of this name."""
        with self._changed:
            if request_id not in self._channels:
                return False
            self._cancelled.add(request_id)
            self._changed.notify_all()
            return True

    def cancel_channel(self, channel: Channel) -> None:
        """Ends all sequences that answer to a channel."""
        with self._changed:
            self._cancelled.update(name for name, other in self._channels.items() if other is channel)
            self._changed.notify_all()

    def channels(self) -> set[Channel]:
        """The channels that a sequence answers to now."""
        with self._changed:
            return set(self._channels.values())

    def step_seconds(self, now: float) -> float:
        """For how long the current step runs, by the monotonic clock; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else now - started

    def close(self, timeout_seconds: float, reason: str = SHUTTING_DOWN) -> None:
        """Takes nothing more, ends every sequence as unavailable here, and all threads but the one that calls this.

        Args:
            timeout_seconds: for each of the three threads.
            reason: what sequences end with, and refusals say.
        """
        with self._changed:
            self._closing = self._closing or reason
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_seconds)
        self._outbox.close(timeout_seconds)

    def _compile_all(self) -> None:
        """Compiles grammars in the order in which they came, until the end."""
        while (request := self._next_to_compile()) is not None:
            arrival = self._compiled(request)
            with self._changed:
                # One that was cancelled meanwhile is not there any more.
                if self._compiling.get(request.request_id) is request:
                    del self._compiling[request.request_id]
                    self._inbox.append(arrival)
                    self._changed.notify_all()

    def _next_to_compile(self) -> SequenceRequest | None:
        with self._changed:
            self._changed.wait_for(lambda: self._compiling or self._closing or self.broken)
            return None if self._closing or self.broken else next(iter(self._compiling.values()))

    def _compiled(self, request: SequenceRequest) -> _Arrival:
        try:
            return _Arrival(request, self._engine.matcher(request))
        except RequestRefused as refused:
            return _Arrival(request, end=_error(request.request_id, refused.reason, refused.message))
        except Exception as error:  # Whatever a grammar causes ends its sequence alone.
            self._log("".join(traceback.format_exception(error)))
            message = f"the grammar cannot be compiled: {error}"
            return _Arrival(request, end=_error(request.request_id, ENGINE_FAILED, message))

    def _run(self) -> None:
        while not self.broken and self._wait_for_work():
            try:
                self._take_in()
                self._step_started = time.monotonic()
                outputs = self._engine.step(self._cancelled.__contains__) if self._engine.has_work else []
                self._step_started = None
                self._failed_step_count = 0
                self._post(outputs)
            except Exception as error:  # Whatever the engine raises ends its sequences, not the thread.
                self._fail_step(error)
        if not self.broken:
            self._end_all(self._closing)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._cancelled or self._closing or self._engine.has_work)
            return not self._closing

    def _take_in(self) -> None:
        """Moves what has arrived into the engine, cancels first, so that their places are free."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            arrived = list(self._inbox)
            self._inbox.clear()
            dropped = {name for name in cancelled if self._compiling.pop(name, None) is not None}
        dropped |= cancelled & {arrival.request.request_id for arrival in arrived}
        for request_id in cancelled - dropped:
            self._engine.cancel(request_id)
        outputs = [SequenceOutput(request_id=name, token_ids=[], finish_reason="cancelled") for name in cancelled]
        for arrival in arrived:
            if arrival.request.request_id not in cancelled:
                outputs += self._add(arrival)
        if outputs:
            self._post(outputs)

    def _add(self, arrival: _Arrival) -> list[SequenceOutput]:
        if arrival.end is not None:
            return [arrival.end]
        try:
            self._engine.add(arrival.request, arrival.matcher)
        except RequestRefused as refused:
            return [_error(arrival.request.request_id, refused.reason, refused.message)]
        return []

    def _post(self, outputs: list[SequenceOutput]) -> None:
        """Sends outputs to their channels, with the load as it is after them."""
        self.load = self._engine.load
        addressed = []
        with self._changed:
            for output in outputs:
                ended = bool(output.finish_reason)
                channel = (self._channels.pop if ended else self._channels.get)(output.request_id, None)
                if ended:
                    self._cancelled.discard(output.request_id)
                if channel is not None:
                    addressed.append((channel, output))
        if addressed:
            self._outbox.post(addressed, self.load)

    def _fail_step(self, error: Exception) -> None:
        """Ends the sequences that the failed step was about; breaks where that fails too, or too often."""
        self._log("".join(traceback.format_exception(error)))
        self._failed_step_count += 1
        self._step_started = None
        message = f"the engine's step failed: {error}"
        with self._changed:
            waiting = {arrival.request.request_id for arrival in self._inbox} | self._compiling.keys()
            names = [name for name in self._channels if name not in waiting]
        try:
            for name in names:
                self._engine.cancel(name)
            broken = (
                isinstance(error, EngineBroken)
                or self._engine.has_work
                or self._failed_step_count >= MAX_FAILED_STEP_COUNT
            )
        except Exception as second:  # An engine that cannot drop a sequence is broken.
            self._log("".join(traceback.format_exception(second)))
            broken = True
        if broken:
            self._end_all(message)
            self._on_broken(message)
        else:
            self._post([_error(name, ENGINE_FAILED, message) for name in names])

    def _end_all(self, message: str) -> None:
        """Ends every sequence, and takes nothing more."""
        with self._changed:
            self.broken = message
            self._inbox.clear()
            self._compiling.clear()
            self._changed.notify_all()
            addressed = [
                (channel, _error(name, ENGINE_UNAVAILABLE, message)) for name, channel in self._channels.items()
            ]
            self._channels.clear()
        self._outbox.post(addressed, self.load)

    def _lose(self, channel: Channel, error: Exception) -> None:
        self._log(f"a client is lost: {error}")
        self.cancel_channel(channel)


class Unavailable(Exception):
    """The engine takes nothing more; the message says why."""


def _error(request_id: str, reason: str, message: str) -> SequenceOutput:
    return SequenceOutput(
        request_id=request_id, token_ids=[], finish_reason="error", error_reason=reason, error_message=message
    )
