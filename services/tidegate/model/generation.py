"""The one path of an answer: from an engine's tokens to the events that a client reads, whatever the surface.

Two tasks share a buffer. One takes tokens as fast as they come: detokenizes, looks for stop texts, adds to the
buffer. The other, the call's own, takes all that is in the buffer as one delta and waits until it is written. So
a client that reads slowly gets fewer and larger deltas, the engine is not held up, and what is kept for it has a
bound (past it the first task waits, and only this stream with it).

Invariants:
- The texts of the deltas given out are always exactly the detokenizer's output for their tokens: whoever goes on
  after those tokens (another replica, or the client by itself) has neither to repeat nor to lose a character.
- `started` comes first, with or after the first token; nothing is given out before, so an error until then is
  raised. Afterwards every error is a `finished` event. Nothing follows `finished`.
- The engine's slot is free when the last event is given out, or the generator is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, Protocol

import structlog

from tidegate.common.errors import Reason, TidegateError, to_status
from tidegate.model.call import Job
from tidegate.model.tokens import Buffer, Chunk
from tidegate.text.detokenizer import IncrementalDetokenizer
from tidegate.text.tokenizer import Tokenizer
from tidegate.v1 import inference_pb2

log = structlog.get_logger()

_FINISH_REASONS: Final = {"stop": inference_pb2.FINISH_REASON_STOP, "length": inference_pb2.FINISH_REASON_LENGTH}


class ChunkSource(Protocol):
    """Gives the tokens that follow those of the list, which grows as they are taken."""

    def chunks(self, job: Job, answer_token_ids: list[int]) -> AsyncGenerator[Chunk, None]: ...


class TokenObserver(Protocol):
    """Is told of tokens as they come, for the load and the metrics."""

    def add_tokens(self, count: int, gap_seconds: float | None) -> None: ...

    def add_first_token(self, seconds: float) -> None: ...


class Generation:
    """One answer being made.

    Args:
        job: what to answer; its record is filled in.
        buffer_token_limit: tokens kept for a slow reader.
        delta_seconds: from one delta to the next, at least, unless the buffer is full; the first one and the last one
            go out at once. 0: each token as it comes.
    """

    def __init__(
        self,
        job: Job,
        source: ChunkSource,
        tokenizer: Tokenizer,
        observer: TokenObserver,
        *,
        buffer_token_limit: int,
        delta_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._record = job.record
        self._source = source
        self._observer = observer
        self._clock = clock
        self._buffer = Buffer(buffer_token_limit)
        self._delta_seconds = delta_seconds
        self._gathers = False
        self._detokenizer = IncrementalDetokenizer(tokenizer, list(job.request.stop))
        self._answer_token_ids: list[int] = list(job.request.resume.token_ids)
        self._unseen_token_count = 0
        self._finish_reason = ""
        self._error: TidegateError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._room = asyncio.Event()

    async def events(self) -> AsyncGenerator[inference_pb2.GenerateEvent, None]:
        """The events of the answer.

        Raises:
            TidegateError: it failed before the first token.
        """
        pump = asyncio.create_task(self._pump())
        timer = self._start_timer(pump)
        try:
            await self._wait_for_output()
            if self._error is not None and not self._finish_reason:
                raise self._error
            yield inference_pb2.GenerateEvent(request_id=self._job.request_id, started=self._started())
            while True:
                if not self._buffer.is_empty:
                    yield self._delta()
                    if self._delta_seconds:
                        await self._gather()
                elif self._ended:
                    break
                else:
                    await self._wait_for_output()
            yield inference_pb2.GenerateEvent(request_id=self._job.request_id, finished=self._finished())
        finally:
            timer.cancel()
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            self._record.completion_token_count = self._completion_token_count

    @property
    def _ended(self) -> bool:
        return bool(self._finish_reason) or self._error is not None

    @property
    def _completion_token_count(self) -> int:
        return len(self._answer_token_ids) + self._unseen_token_count

    def _start_timer(self, pump: asyncio.Task[None]) -> asyncio.TimerHandle:
        def end() -> None:
            if not self._ended:
                self._error = TidegateError(
                    Reason.DEADLINE_EXCEEDED, "The request's deadline passed before its answer was complete."
                )
                pump.cancel()
                self._wake_reader()

        return asyncio.get_running_loop().call_later(max(0.0, self._record.deadline - self._clock()), end)

    async def _pump(self) -> None:
        try:
            await self._take_all()
        except TidegateError as error:
            self._error = self._error or error
        except asyncio.CancelledError:
            self._error = self._error or TidegateError(Reason.CANCELLED, "The client left.")
            raise
        except Exception:
            log.exception("answer_failed", request_id=self._record.request_id)
            self._error = TidegateError(
                Reason.INTERNAL_ERROR, "The answer could not be finished because of a fault in the service."
            )
        finally:
            self._wake_reader()

    async def _take_all(self) -> None:
        """Takes chunks until the answer is complete."""
        if self._replay():
            return
        async with aclosing(self._source.chunks(self._job, self._answer_token_ids)) as chunks:
            async for chunk in chunks:
                if self._accept(chunk):
                    return
                while self._buffer.is_full:
                    self._room.clear()
                    await self._room.wait()
        raise TidegateError(Reason.INTERNAL_ERROR, "The engine ended the answer without saying why.")

    def _replay(self) -> bool:
        """Brings the detokenizer to where the answer broke off; True when the answer was complete by then."""
        if not self._answer_token_ids:
            return False
        if self._detokenizer.push(self._answer_token_ids).stopped:
            self._finish_reason = "stop"
        elif len(self._answer_token_ids) >= self._job.max_tokens:
            self._end_of_text("length")
        return bool(self._finish_reason)

    def _accept(self, chunk: Chunk) -> bool:
        """Takes one chunk; True when the answer is complete with it."""
        step = self._detokenizer.push(chunk.token_ids)
        used_count = step.token_count_used
        whole = used_count == len(chunk.token_ids)
        token_ids = chunk.token_ids if whole else chunk.token_ids[:used_count]
        self._record.cached_token_count = min(chunk.cached_token_count, self._job.prompt.prompt_token_count)
        if used_count or chunk.finish_reason:
            unused_count = len(chunk.token_ids) - used_count
            self._count(used_count + chunk.unseen_token_count, unused_count)
            self._answer_token_ids += token_ids
        self._buffer.add(step.text, token_ids, chunk.logprobs if whole else chunk.logprobs[:used_count])
        if step.stopped:
            self._finish_reason = "stop"
        elif chunk.finish_reason:
            self._unseen_token_count = chunk.unseen_token_count
            self._end_of_text(chunk.finish_reason)
        self._wake_reader()
        return bool(self._finish_reason)

    def _end_of_text(self, finish_reason: str) -> None:
        self._buffer.add(self._detokenizer.finish(), (), ())
        self._finish_reason = finish_reason

    def _count(self, token_count: int, unused_count: int) -> None:
        """Counts new tokens; those after the text that ended the answer took their part of the time since the last."""
        now = self._clock()
        record = self._record
        if record.first_token_at is None:
            record.first_token_at = now
            self._observer.add_first_token(now - record.arrived_at)
            self._observer.add_tokens(token_count, None)
        else:
            assert record.last_token_at is not None
            if unused_count:
                now -= (now - record.last_token_at) * unused_count / (token_count + unused_count)
            self._observer.add_tokens(token_count, now - record.last_token_at)
        record.last_token_at = now

    def _wake_reader(self) -> None:
        if self._gathers and not self._ended and not self._buffer.is_full:
            return
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _wait_for_output(self) -> None:
        if not self._ended:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    async def _gather(self) -> None:
        """Lets tokens come together."""
        if self._buffer.is_full:
            return
        self._gathers = True
        timer = asyncio.get_running_loop().call_later(self._delta_seconds, self._end_gathering)
        try:
            await self._wait_for_output()
        finally:
            timer.cancel()
            self._gathers = False

    def _end_gathering(self) -> None:
        self._gathers = False
        self._wake_reader()

    def _delta(self) -> inference_pb2.GenerateEvent:
        """All that is in the buffer as one event; filled in place, which costs half of putting parts together."""
        event = inference_pb2.GenerateEvent(request_id=self._job.request_id)
        self._buffer.move_to(event.delta)
        self._room.set()
        return event

    def _started(self) -> inference_pb2.Started:
        return inference_pb2.Started(
            model=self._job.request.model,
            prompt_token_count=self._job.prompt.prompt_token_count,
            truncated_token_count=self._job.prompt.truncated_token_count,
        )

    def _finished(self) -> inference_pb2.Finished:
        record = self._record
        record.finish_reason = self._finish_reason or "error"
        finished = inference_pb2.Finished(
            reason=_FINISH_REASONS.get(self._finish_reason, inference_pb2.FINISH_REASON_ERROR),
            usage=inference_pb2.Usage(
                prompt_token_count=self._job.prompt.prompt_token_count,
                completion_token_count=self._completion_token_count,
                cached_token_count=record.cached_token_count,
            ),
        )
        if record.time_to_first_token_seconds is not None:
            finished.time_to_first_token.FromNanoseconds(int(record.time_to_first_token_seconds * 1e9))
        if not self._finish_reason and self._error is not None:
            record.reason = self._error.reason.name
            finished.error.CopyFrom(to_status(self._error))
        return finished
