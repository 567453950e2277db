"""Waiting for a slot, and what can happen to those who wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.model.credits import CreditLedger, Terms, Urgency
from tidegate.model.slots import Slots


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_slots(count: int, clock: Callable[[], float] = time.monotonic, **changes: float) -> Slots:
    """So many free slots; `changes` are of the terms."""
    terms = {"lease_seconds": 5.0, "grace_seconds": 1.0, "protected_seconds": 0.25, "queue_limit": 8}
    ledger = CreditLedger(Terms(overflow_slot_count=0, **(terms | changes)), "life")
    slots = Slots(ledger, lambda: 1.0, clock)
    slots.set_capacity(count, can_start=True)
    return slots


async def test_a_client_that_leaves_as_the_engine_goes_away_gives_its_place_up_once():
    slots = make_slots(0, queue_limit=4)
    waiting = asyncio.create_task(slots.take(credit_id="", resumed=False))
    await asyncio.sleep(0)
    assert slots.ledger.waiting_count == 1
    slots.fail_waiting(TidegateError(Reason.REPLICA_UNAVAILABLE, "The replica's engine went away."))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert slots.ledger.waiting_count == 0


async def test_who_is_paused_before_it_knows_that_it_was_admitted_goes_on_all_the_same():
    slots = make_slots(4, preempting_share=0.25)
    running = [await slots.take(credit_id="", resumed=False, urgency=Urgency.STANDARD) for _ in range(4)]
    batch, realtime = (
        asyncio.create_task(slots.take(credit_id="", resumed=False, urgency=urgency))
        for urgency in (Urgency.BATCH, Urgency.REALTIME)
    )
    await asyncio.sleep(0)
    # The slot goes to the one that waited first, and from it to the more urgent one, before either hears of it.
    running[0].release()
    assert (slots.ledger.running_count, slots.ledger.paused_count) == (4, 1)
    running += [await task for task in (batch, realtime)]
    for slot in running:
        slot.release()
    assert (slots.ledger.running_count, slots.ledger.paused_count, slots.starting_count) == (0, 0, 0)


async def test_a_request_that_could_not_be_answered_in_time_behind_the_queue_is_refused_and_not_let_wait():
    clock = Clock()
    slots = make_slots(2, clock)
    for _ in range(20):
        held = [await slots.take(credit_id="", resumed=False) for _ in range(2)]
        clock.now += 1.0
        for slot in held:
            slot.release()
    running = [await slots.take(credit_id="", resumed=False) for _ in range(2)]
    waiting = [asyncio.create_task(slots.take(credit_id="", resumed=False, seconds_left=3.5)) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(TidegateError) as refused:
        await slots.take(credit_id="", resumed=False, seconds_left=3.0)
    assert refused.value.reason is Reason.SERVER_IS_OVERLOADED
    assert refused.value.retry_after_seconds is not None
    assert slots.ledger.waiting_count == 4
    # One that began elsewhere goes first, whatever waits.
    resumed = asyncio.create_task(slots.take(credit_id="", resumed=True, seconds_left=3.0))
    await asyncio.sleep(0)
    assert slots.ledger.waiting_count == 5
    running[0].release()
    (await resumed).release()
    running[1].release()
    for task in waiting:
        (await task).release()


async def test_before_it_is_known_how_fast_the_queue_moves_nobody_is_refused_for_it():
    slots = make_slots(1, Clock())
    running = await slots.take(credit_id="", resumed=False)
    waiting = asyncio.create_task(slots.take(credit_id="", resumed=False, seconds_left=0.001))
    await asyncio.sleep(0)
    running.release()
    (await waiting).release()
