"""A process that generates load: `python -m tidegate.bench.worker`, started by workers.py.

It reads jobs from standard input and writes what becomes of them to standard output, one job after the other, until
its input ends. It runs on uvloop, and with the garbage collector off during a run: there is nothing to collect, and a
collection of a million records would stand in the way of the plan.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import uvloop

from tidegate.bench import job
from tidegate.bench.clients.choice import open_client
from tidegate.bench.known_answers import checker_of
from tidegate.bench.ledger import WorkerFigures
from tidegate.bench.sender import Sender
from tidegate.text.gguf_metadata import ModelFileError

PROGRESS_SECONDS: Final = 0.25
"""Between two words on how far it is."""


async def serve(reader: asyncio.StreamReader, write: Callable[[bytes], None]) -> None:
    """Does jobs until the input ends."""
    while True:
        try:
            message = job.to_worker.decode(await job.read_frame(reader))
        except asyncio.IncompleteReadError:
            return
        if isinstance(message, job.Job):
            try:
                await _do(message, reader, write)
            except (OSError, ValueError, ModelFileError) as error:
                write(job.frame(job.Broken(str(error))))


async def _do(message: job.Job, reader: asyncio.StreamReader, write: Callable[[bytes], None]) -> None:
    begins_at = time.monotonic()

    def now() -> float:
        return time.monotonic() - begins_at

    client = open_client(message.target, now)
    checker = checker_of(message.target.engine, message.target.model_path)
    sender = Sender(message.plan, message.target, client, now, share=message.share, checker=checker)
    await client.start()
    try:
        write(job.frame(job.Ready()))
        begin = job.to_worker.decode(await job.read_frame(reader))
        if not isinstance(begin, job.Begin):
            write(job.frame(job.Done([], WorkerFigures())))
            return
        begins_at = begin.monotonic_seconds
        figures = await _measured(sender, reader, write)
    finally:
        await client.close()
    figures.checked_answers = sender.finish()
    write(job.frame(job.Done(sender.records, figures)))


async def _measured(sender: Sender, reader: asyncio.StreamReader, write: Callable[[bytes], None]) -> WorkerFigures:
    """Runs it, with its progress told, until its end or the word to stop."""
    gc.collect()
    gc.freeze()
    gc.disable()
    wall, cpu = time.monotonic(), time.process_time()
    running = asyncio.create_task(sender.run())
    stop = asyncio.create_task(job.read_frame(reader))
    waiting: set[asyncio.Task[Any]] = {running, stop}
    try:
        while not running.done():
            await asyncio.wait(waiting, timeout=PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            write(job.frame(job.Moved(sender.progress)))
            if stop.done() and not running.done():
                running.cancel()
                await asyncio.wait([running])
        if not running.cancelled():
            running.result()
    finally:
        stop.cancel()
        await asyncio.gather(stop, return_exceptions=True)
        gc.enable()
    return WorkerFigures(
        request_count=len(sender.records),
        token_count=sender.progress.tokens,
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.monotonic() - wall,
        largest_in_flight=sender.largest_in_flight,
    )


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 30)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    # What a library prints must not get into the frames.
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with os.fdopen(output, "wb", buffering=0) as pipe:

        def write(content: bytes) -> None:
            view = memoryview(content)
            while view:
                view = view[pipe.write(view) :]

        await serve(reader, write)


if __name__ == "__main__":
    uvloop.run(_main())
