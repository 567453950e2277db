"""What a replica says of how it is: first tokens that never came, and requests between it and its engine."""

from __future__ import annotations

import pytest

from tidegate.model.credits import CreditLedger, Terms
from tidegate.model.load import LATENESS_WINDOW_SECONDS, MANY_IN_TRANSIT, ReplicaLoad
from tidegate.model.slots import Slot, Slots
from tidegate.model.triton_messages import EngineLoad

RATE = 50.0
"""Requests that end a second."""


class Replica:
    """Its figures, with an engine and a clock of the test's."""

    def __init__(self) -> None:
        self.now = 0.0
        self.running = self.waiting = 0
        self.load = ReplicaLoad("a:1", "m", 2048, self.engine, clock=lambda: self.now)
        terms = Terms(
            lease_seconds=5.0, grace_seconds=1.0, protected_seconds=0.25, queue_limit=8, overflow_slot_count=0
        )
        self.load.slots = self.slots = Slots(CreditLedger(terms, "life"), lambda: 1.0, lambda: self.now)
        self.slots.set_capacity(1000, can_start=True)

    def engine(self) -> EngineLoad:
        return EngineLoad(self.running, self.waiting, 1000, 8, 100, 100, 16, 0)

    async def take(self, count: int) -> list[Slot]:
        return [await self.slots.take(credit_id="", resumed=False) for _ in range(count)]

    def pass_time(self, seconds: float) -> None:
        """Requests end all the time, and the replica says how it is."""
        for _ in range(round(seconds * RATE)):
            self.now += 1 / RATE
            self.load.add_request(failed=False)
            self.load.snapshot()

    @property
    def lateness_seconds(self) -> float:
        return self.load.snapshot().lateness.ToMilliseconds() / 1000

    @property
    def first_token_seconds(self) -> float:
        return self.load.snapshot().time_to_first_token.ToMilliseconds() / 1000


@pytest.fixture
def replica() -> Replica:
    made = Replica()
    made.pass_time(20.0)
    return made


def test_requests_that_never_had_a_first_token_make_the_time_to_it_longer_and_never_shorter(replica):
    for _ in range(10):
        replica.load.add_first_token(0.1)
    for _ in range(10):
        replica.load.add_silence(0.01)
    assert replica.first_token_seconds == pytest.approx(0.1, abs=0.002)
    for _ in range(30):
        replica.load.add_silence(4.0)
    assert replica.first_token_seconds > 3.0
    replica.load.add_silence(1.0)
    assert replica.first_token_seconds > 3.0
    replica.load.add_silence(1e6)
    assert replica.first_token_seconds < 4.2


async def test_what_is_on_its_way_to_the_engine_and_back_is_late_by_the_rate_at_which_requests_end(replica):
    slots = await replica.take(100)
    replica.running = 10
    replica.pass_time(2 * LATENESS_WINDOW_SECONDS)
    assert replica.lateness_seconds == pytest.approx(90 / RATE, rel=0.1)
    for slot in slots[:50]:
        slot.release()
    replica.pass_time(2 * LATENESS_WINDOW_SECONDS)
    assert replica.lateness_seconds == pytest.approx(40 / RATE, rel=0.1)


@pytest.mark.parametrize("has", [{"running": 100}, {"running": 60, "waiting": 40 - MANY_IN_TRANSIT + 1}])
async def test_what_an_engine_has_is_not_late_however_many_these_are(replica, has):
    await replica.take(100)
    replica.running, replica.waiting = has["running"], has.get("waiting", 0)
    replica.pass_time(5.0)
    assert replica.lateness_seconds == 0


async def test_an_engine_that_has_not_said_yet_what_came_is_not_late(replica):
    await replica.take(100)
    replica.pass_time(LATENESS_WINDOW_SECONDS / 4)
    replica.running = 100
    replica.pass_time(LATENESS_WINDOW_SECONDS)
    assert replica.lateness_seconds == 0
