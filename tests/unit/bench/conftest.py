"""A clock that jumps: the sender's own code in virtual time, so that hours of it take no time and times are exact."""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tidegate.bench.clients.answer import Answer, Ask
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Record
from tidegate.bench.plan import Plan
from tidegate.bench.sender import Sender
from tidegate.bench.targets import Target

sys.path.insert(0, str(Path(__file__).parent))


class JumpingSelector(selectors.DefaultSelector):
    """Does not wait; says how long it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everything waits for something that never comes"
        self.waited += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is what its timers say."""

    def __init__(self) -> None:
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.waited


def run_virtually(make: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(make(runner.get_loop()))


AnswerFunction = Callable[[Ask, Answer, Callable[[], float]], Coroutine[Any, Any, None]]


class ScriptedClient:
    """Answers as a function says, in the loop's own time."""

    def __init__(self, answer: AnswerFunction, stalls: dict[int, float], *, wants_text: bool) -> None:
        self.wants_text = wants_text
        self._answer = answer
        self._stalls = stalls
        self.now: Callable[[], float] = lambda: 0.0

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def ask(self, ask: Ask, answer: Answer) -> None:
        if ask.number in self._stalls:
            # Time goes by and nothing else runs, as when the process is starved.
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.jumping.waited += self._stalls[ask.number]
        await self._answer(ask, answer, self.now)


@pytest.fixture
def sent():
    """Runs flows against an answer function; the records, in order of their numbers."""

    def run(
        flows: list[Flow],
        answer: AnswerFunction,
        *,
        stalls: dict[int, float] | None = None,
        wants_text: bool = False,
        **arguments: Any,
    ) -> list[Record]:
        client = ScriptedClient(answer, stalls or {}, wants_text=wants_text)

        async def in_loop(loop: VirtualLoop) -> list[Record]:
            client.now = loop.time
            plan = Plan(load=Load(name="test", flows=tuple(flows)), seed=1)
            sender = Sender(plan, Target(address=""), client, loop.time, **arguments)
            await sender.run()
            sender.finish()
            return sorted(sender.records, key=lambda record: record.number)

        return run_virtually(in_loop)

    return run


@pytest.fixture
def answer_at_once() -> AnswerFunction:
    async def answers(ask: Ask, answer: Answer, now: Callable[[], float]) -> None:
        answer.accepted = answer.first_token = answer.last_token = now()
        answer.token_ids = [1] * ask.max_tokens
        answer.token_count = ask.max_tokens
        answer.complete(ask.max_tokens)

    return answers
