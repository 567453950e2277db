"""Runs the lives of all open batches, and removes what is too old."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from tidegate.batch.life import BatchLife, Means
from tidegate.batch.records import StoredBatch

log = structlog.get_logger()

FAULT_PAUSE_SECONDS: Final = 5.0
"""A life that was cut off by a fault (a full disk) begins anew after this."""


class Runner:
    """The lives of the batches that have not ended; there are as many as the store lets be open."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._lives: dict[int, BatchLife] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Takes up the batches that an earlier process left open, and goes on sweeping."""
        known = await self._means.store.do(lambda store: store.file_ids())
        leftover_count = await asyncio.to_thread(self._means.folder.sweep, known)
        batches = await self._means.store.do(lambda store: store.open_batches())
        for batch in batches:
            self.add(batch)
        self._spawn(self._sweep())
        log.info("took_up", batch_count=len(batches), leftover_file_count=leftover_count)

    def add(self, batch: StoredBatch) -> None:
        """Begins the life of a batch that stands in the store."""
        assert batch.number not in self._lives, batch.id
        life = self._lives[batch.number] = BatchLife(batch.number, self._means)
        self._means.metrics.open.set(len(self._lives))
        self._spawn(self._live(batch, life))

    def cancel(self, batch: StoredBatch) -> None:
        """The store has it as `cancelling`."""
        if batch.number in self._lives:
            self._lives[batch.number].cancel()

    async def stop(self) -> None:
        """Cuts all lives off; the next start goes on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _live(self, batch: StoredBatch, life: BatchLife) -> None:
        while True:
            try:
                status = await life.run()
                break
            except Exception:
                log.exception("batch_cut_off", batch=batch.id)
                await asyncio.sleep(FAULT_PAUSE_SECONDS)
        del self._lives[batch.number]
        self._means.metrics.open.set(len(self._lives))
        self._means.metrics.ended.labels(status.value).inc()
        seconds = round(self._means.unix_seconds() - batch.created_at, 3)
        log.info("batch_ended", batch=batch.id, tenant=batch.tenant, status=status.value, seconds=seconds)

    async def _sweep(self) -> None:
        lifetime = self._means.settings.lifetime_seconds
        while True:
            try:
                expired = await self._means.store.do(
                    lambda store: store.forget_old(self._means.now, lifetime_seconds=lifetime)
                )
                for file_id in expired:
                    self._means.folder.remove(file_id)
            except Exception:
                log.exception("sweep_failed")
            await asyncio.sleep(self._means.settings.sweep_interval_seconds)

    def _spawn(self, coroutine: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
