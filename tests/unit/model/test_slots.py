"""Waiting for a slot, and what can happen to those who wait."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.model.credits import CreditLedger, Terms
from tidegate.model.slots import Slots


async def test_a_client_that_leaves_as_the_engine_goes_away_gives_its_place_up_once():
    terms = Terms(lease_seconds=5.0, grace_seconds=1.0, protected_seconds=0.25, queue_limit=4, overflow_slot_count=0)
    slots = Slots(CreditLedger(terms, "life"), lambda: 1.0)
    slots.set_capacity(0, can_start=True)
    waiting = asyncio.create_task(slots.take(credit_id="", resumed=False))
    await asyncio.sleep(0)
    assert slots.ledger.waiting_count == 1
    slots.fail_waiting(TidegateError(Reason.REPLICA_UNAVAILABLE, "The replica's engine went away."))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert slots.ledger.waiting_count == 0
