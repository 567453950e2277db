"""Follows the engine: its load becomes the slots' capacity, its readiness the service's health."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import structlog

from tidegate.common.errors import Reason, TidegateError
from tidegate.model.capacity import Bounds
from tidegate.model.load import ReplicaLoad
from tidegate.model.prompts import PromptSource
from tidegate.model.slots import Slots
from tidegate.model.triton_client import ArenaUnavailable, EngineLoad, TritonClient

log = structlog.get_logger()


class Planned(NamedTuple):
    """What the slots are told."""

    slot_count: int
    can_start: bool
    ahead_count: int


class EngineWatch:
    """Keeps slots and health in step with Triton.

    Args:
        slot_limit: a bound below the engine's own; 0 for none.
        set_serving: says in health whether requests are taken.
        poll_seconds: between two looks at what no event tells of.
    """

    def __init__(
        self,
        triton: TritonClient,
        slots: Slots,
        load: ReplicaLoad,
        prompts: PromptSource,
        *,
        slot_limit: int,
        set_serving: Callable[[bool], Awaitable[None]],
        poll_seconds: float,
    ) -> None:
        self._triton = triton
        self._slots = slots
        self._load = load
        self._prompts = prompts
        self._slot_limit = slot_limit
        self._set_serving = set_serving
        self._poll_seconds = poll_seconds
        self._others_count = 0
        self._capacity = Planned(0, False, 0)
        self._ready_changed = asyncio.Event()

    def start(self) -> None:
        """Listens to the Triton client."""
        self._triton.on_load.append(self.take_load)
        self._triton.on_ready.append(self.take_ready)

    def take_load(self, load: EngineLoad) -> None:
        """Takes the engine's figures, as often as its messages come; a change alone costs more than a comparison."""
        if not self._triton.ready:
            return
        ledger = self._slots.ledger
        others_count = max(0, load.running + load.waiting - ledger.engine_count)
        # A cancelled sequence counts in the engine until its next step; other clients' sequences stay.
        foreign_count = min(others_count, self._others_count)
        self._others_count = others_count
        bounds = Bounds(
            max_sequences=max(0, min(load.max_sequences, self._slot_limit or load.max_sequences) - foreign_count),
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            block_token_count=load.block_token_count,
        )
        slot_count, ahead_count = self._load.plan(bounds, ledger.engine_count)
        # What is paused waits in the engine, and what was promised ahead.
        allowed_count = ledger.paused_count + ahead_count
        self._set_capacity(Planned(slot_count, load.waiting <= allowed_count, ahead_count))

    def take_ready(self, ready: bool) -> None:
        """Takes a change of readiness."""
        self._load.not_ready_reason = "" if ready else "the engine is away"
        if ready:
            if self._triton.latest_load is not None:
                self.take_load(self._triton.latest_load)
        else:
            self._set_capacity(Planned(0, False, 0))
            self._slots.fail_waiting(
                TidegateError(Reason.REPLICA_UNAVAILABLE, "The replica's engine went away.", retry_after_seconds=1.0)
            )
        self._ready_changed.set()

    async def run(self) -> None:
        """Keeps health, the registered memory and the published figures up to date, for ever."""
        serving = None
        while True:
            self._ready_changed.clear()
            if self._triton.ready != serving:
                serving = self._triton.ready
                await self._set_serving(serving)
            self._load.snapshot()
            if serving:
                await self._register_arena()
            try:
                await asyncio.wait_for(self._ready_changed.wait(), self._poll_seconds)
            except TimeoutError:
                continue

    async def _register_arena(self) -> None:
        try:
            await self._prompts.register(self._triton.register_arena)
        except ArenaUnavailable as error:
            log.debug("arena_not_registered", error=str(error))

    def _set_capacity(self, capacity: Planned) -> None:
        if capacity != self._capacity:
            self._capacity = capacity
            self._slots.set_capacity(capacity.slot_count, can_start=capacity.can_start, ahead=capacity.ahead_count)
