"""The life of one batch, from its file to its output files: read, send, write. It can be cut off anywhere.

What is done stands in the store, and a life that begins anew goes on from there. A line that was sent and whose result
was not kept is sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final
from uuid import uuid4

import msgspec
import structlog

from tidegate.batch import lines
from tidegate.batch.config import Settings
from tidegate.batch.file_folder import FileFolder, new_file_id
from tidegate.batch.gate import Gate
from tidegate.batch.inference_client import InferenceClient
from tidegate.batch.lines import LineFault
from tidegate.batch.metrics import BatchMetrics
from tidegate.batch.records import Status, StoredBatch, StoredFile
from tidegate.batch.store import NewLine, PendingLine
from tidegate.batch.store_thread import StoreThread
from tidegate.batch.verdicts import Verdict, verdict
from tidegate.common.errors import Reason, TidegateError

log = structlog.get_logger()

PAGE_LINES: Final = 200
"""Lines a transaction, and a read."""

_UNSENT: Final = {
    Status.EXPIRED: (lines.BATCH_EXPIRED, "The completion window ended before this request was answered."),
    Status.CANCELLED: (lines.BATCH_CANCELLED, "The batch was cancelled before this request was answered."),
}


class Means(msgspec.Struct, frozen=True):
    """What every life works with; `unix_seconds` is wall time."""

    store: StoreThread
    folder: FileFolder
    gate: Gate
    inference: InferenceClient
    settings: Settings
    metrics: BatchMetrics
    unix_seconds: Callable[[], float]

    @property
    def now(self) -> int:
        """Unix seconds, as OpenAI's objects have them."""
        return int(self.unix_seconds())


class BatchLife:
    """One batch that has not ended."""

    def __init__(self, number: int, means: Means) -> None:
        self._number = number
        self._means = means
        self._store = means.store
        self._cancelled = asyncio.Event()

    def cancel(self) -> None:
        """The store says `cancelling`: send no more."""
        self._cancelled.set()

    async def run(self) -> Status:
        """Brings the batch to its end; answers which."""
        batch = await self._batch()
        if batch.ends_as is None and batch.in_progress_at is None:
            if not await self._read_file(batch):
                return Status.FAILED
            batch = await self._batch()
        ends_as = batch.ends_as
        if ends_as is None:
            wanted = await self._send(batch) if batch.status is Status.IN_PROGRESS else Status.CANCELLED
            await self._close(batch, wanted)
            ends_as = await self._store.do(lambda store: store.decide_end(self._number, wanted, self._means.now))
        await self._write_files(await self._batch())
        return ends_as

    async def _batch(self) -> StoredBatch:
        return await self._store.do(lambda store: store.batch_by_number(self._number))

    async def _read_file(self, batch: StoredBatch) -> bool:
        """Takes the lines out of the file; answers whether there is something to send."""
        await self._store.do(lambda store: store.forget_lines(self._number))
        try:
            file = await asyncio.to_thread(self._means.folder.open, batch.input_file_id)
        except FileNotFoundError:
            return await self._fail("file_not_found", f"The file {batch.input_file_id} is gone.")
        limit, count = self._means.settings.line_count_limit, 0
        with file:
            found = new_lines(batch, lines.split(file, self._means.settings.line_bytes_limit))
            while page := await asyncio.to_thread(lambda: list(islice(found, PAGE_LINES))):
                count += len(page)
                if count > limit:
                    return await self._fail("too_many_lines", f"The file has more than {limit} lines.")
                await self._store.do(lambda store, page=page: store.add_lines(self._number, page))
        if not count:
            return await self._fail("empty_file", "The file has no lines.")
        await self._store.do(lambda store: store.start(self._number, self._means.now))
        return True

    async def _fail(self, code: str, message: str) -> bool:
        error = {"code": code, "message": message, "param": "input_file_id", "line": None}
        await self._store.do(lambda store: store.fail(self._number, [error], self._means.now))
        return False

    async def _send(self, batch: StoredBatch) -> Status:
        """Sends lines until all have results, or the batch is cancelled, or its time is over."""
        sending = asyncio.create_task(self._send_all(batch))
        cancelled = asyncio.create_task(self._cancelled.wait())
        remaining = batch.expires_at - self._means.unix_seconds()
        try:
            await asyncio.wait((sending, cancelled), timeout=max(0.0, remaining), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
                return Status.COMPLETED
            return Status.CANCELLED if cancelled.done() else Status.EXPIRED
        finally:
            for task in (sending, cancelled):
                task.cancel()
            await asyncio.gather(sending, cancelled, return_exceptions=True)

    async def _send_all(self, batch: StoredBatch) -> None:
        # As many lines of a batch are in memory as could be in flight.
        places = asyncio.Semaphore(self._means.settings.in_flight_limit)
        after = 0
        async with asyncio.TaskGroup() as group:
            while page := await self._pending(after):
                for line in page:
                    await places.acquire()
                    group.create_task(self._send_line(batch, line)).add_done_callback(lambda _: places.release())
                after = page[-1].number

    async def _send_line(self, batch: StoredBatch, line: PendingLine) -> None:
        """Tries one line until it has a result, and keeps that."""
        gate, attempt_count = self._means.gate, 0
        while True:
            request_id = uuid4().hex
            try:
                async with gate.turn(batch.tenant):
                    body = await self._means.inference.ask(batch, line.body, request_id)
                result = lines.answered(line_id(batch, line.number), line.custom_id, request_id, body)
            except msgspec.DecodeError:
                error = TidegateError(Reason.INTERNAL_ERROR, "The answer was not JSON.")
            except TidegateError as refusal:
                error = refusal
            else:
                gate.found_room()
                return await self._keep(line, completed=True, result=result, usage=lines.usage_of(body))
            found = verdict(error, attempt_count + 1, self._means.settings.attempt_limit)
            log.debug("line_not_answered", batch=batch.id, line=line.number, reason=error.reason.name, then=found.name)
            if found is Verdict.FAILED:
                result = lines.refused(line_id(batch, line.number), line.custom_id, request_id, error)
                return await self._keep(line, completed=False, result=result)
            self._means.metrics.refusals.labels(error.reason.name.lower()).inc()
            attempt_count += found is Verdict.AGAIN
            gate.pause(error.retry_after_seconds, tenant=None if found is Verdict.WAIT else batch.tenant)

    async def _keep(
        self, line: PendingLine, *, completed: bool, result: bytes, usage: lines.Usage | None = None
    ) -> None:
        kept = await self._store.do(
            lambda store: store.finish_line(
                self._number, line.number, completed=completed, result=result, usage=usage
            )
        )  # fmt: skip
        if kept:
            self._means.metrics.lines.labels("completed" if completed else "failed").inc()

    async def _close(self, batch: StoredBatch, status: Status) -> None:
        """Gives every line that was not answered its result."""
        if status not in _UNSENT:
            return
        code, message = _UNSENT[status]
        after = 0
        while page := await self._pending(after):
            after = page[-1].number
            results = [
                (line.number, lines.not_sent(line_id(batch, line.number), line.number,
                                             LineFault(code, message, custom_id=line.custom_id)))
                for line in page
            ]  # fmt: skip
            await self._store.do(lambda store, results=results: store.fail_lines(self._number, results))
            self._means.metrics.lines.labels("failed").inc(len(results))

    async def _pending(self, after: int) -> list[PendingLine]:
        return await self._store.do(lambda store: store.pending_lines(self._number, after=after, limit=PAGE_LINES))

    async def _write_files(self, batch: StoredBatch) -> None:
        output = await self._write_file(batch, completed=True)
        errors = await self._write_file(batch, completed=False)
        await self._store.do(lambda store: store.end(self._number, output, errors, self._means.now))

    async def _write_file(self, batch: StoredBatch, *, completed: bool) -> StoredFile | None:
        """Writes the results of one kind; None when there are none."""
        file_id, after = new_file_id(), 0
        partial = self._means.folder.begin(file_id)
        try:
            while page := await self._results(after, completed=completed):
                await asyncio.to_thread(partial.write, b"".join(result + b"\n" for _, result in page))
                after = page[-1][0]
            if not partial.byte_count:
                return None
            # Kept and not in the store, if all ends here: the next start sweeps it away.
            await asyncio.to_thread(partial.keep)
        finally:
            partial.drop()
        now = self._means.now
        return StoredFile(
            id=file_id,
            tenant=batch.tenant,
            filename=f"{batch.id}_{'output' if completed else 'error'}.jsonl",
            purpose="batch_output",
            byte_count=partial.byte_count,
            created_at=now,
            expires_at=now + self._means.settings.lifetime_seconds,
        )

    async def _results(self, after: int, *, completed: bool) -> list[tuple[int, bytes]]:
        return await self._store.do(
            lambda store: store.results(self._number, completed=completed, after=after, limit=PAGE_LINES)
        )


def new_lines(batch: StoredBatch, texts: Iterator[tuple[int, bytes | None]]) -> Iterator[NewLine]:
    """The lines of a file, those that cannot be sent with their results."""
    seen: set[str] = set()
    for number, text in texts:
        try:
            if text is None:
                raise LineFault(lines.LINE_TOO_LONG, "The line is longer than a request may be.")
            line = lines.parse(text, batch.endpoint)
            if line.custom_id in seen:
                message = "Another line before this one has the same custom_id."
                raise LineFault(lines.DUPLICATE_CUSTOM_ID, message, param="custom_id", custom_id=line.custom_id)
        except LineFault as fault:
            yield NewLine(number, fault.custom_id, None, lines.not_sent(line_id(batch, number), number, fault))
        else:
            seen.add(line.custom_id)
            yield NewLine(number, line.custom_id, line.body)


def line_id(batch: StoredBatch, number: int) -> str:
    """The id of a line in the output; the same whenever it is made."""
    return f"batch_req_{batch.id.removeprefix('batch_')}{number:06x}"
