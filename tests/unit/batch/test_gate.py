"""The gate: how many lines are out, in which turns, and how long nobody goes after a refusal."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.batch.gate import Gate
from tidegate.batch.verdicts import Pauses


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Lines:
    """Lines that go through a gate and stay out until they are let back."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.out: list[str] = []
        self._back = asyncio.Event()

    async def _go(self, tenant: str) -> None:
        async with self._gate.turn(tenant):
            self.out.append(tenant)
            await self._back.wait()

    def send(self, *tenants: str) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._go(tenant)) for tenant in tenants]

    def come_back(self) -> None:
        self._back.set()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(Pauses(1.0, 60.0), clock)


async def test_a_gate_is_closed_until_something_is_allowed_and_then_takes_turns(gate):
    lines = Lines(gate)
    tasks = lines.send("a", "a", "a", "b")
    await settle()
    assert (lines.out, gate.is_wanted) == ([], True)
    gate.allow(2)
    await settle()
    assert sorted(lines.out) == ["a", "b"]
    gate.allow(0)
    lines.come_back()
    await settle()
    assert (len(lines.out), gate.in_flight) == (2, 0)
    gate.allow(2)
    await asyncio.gather(*tasks)
    assert (sorted(lines.out), gate.is_wanted) == (["a", "a", "a", "b"], False)


async def test_refusals_that_come_together_are_one(gate, clock):
    assert [gate.pause(None) for _ in range(8)] == [1.0] * 8
    clock.now = 1.0
    assert gate.pause(3.0) == 3.0
    gate.found_room()
    clock.now = 4.0
    assert gate.pause(None) == 1.0


async def test_nobody_goes_during_a_pause_and_one_tenants_pause_is_its_own(gate, clock):
    lines = Lines(gate)
    gate.pause(None, tenant="a")
    gate.allow(8)
    tasks = lines.send("a", "b")
    await settle()
    assert lines.out == ["b"]
    clock.now = 1.0
    gate.pause(5.0)
    gate.allow(8)
    await settle()
    assert lines.out == ["b"]
    clock.now = 6.0
    gate.allow(8)
    lines.come_back()
    await asyncio.gather(*tasks)
    assert lines.out == ["b", "a"]


@pytest.mark.parametrize("allowed_first", [False, True])
async def test_a_line_that_is_cancelled_leaves_its_place(gate, allowed_first):
    lines = Lines(gate)
    (task,) = lines.send("a")
    await settle()
    if allowed_first:
        gate.allow(1)  # It has the place, and has not noticed.
        task.cancel()
    else:
        task.cancel()
        gate.allow(1)
    await asyncio.gather(task, return_exceptions=True)
    assert (gate.in_flight, gate.is_wanted, lines.out) == (0, False, [])
    lines.come_back()
    await asyncio.gather(*lines.send("b"))
    assert lines.out == ["b"]
