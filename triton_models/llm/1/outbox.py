"""Carries outputs from the engine's thread to the clients on a thread of its own.

Handing a response to Triton takes some 0.2 ms a response, which the engine must not wait for. Invariants: what is
not sent yet of one sequence is one output, merged from as many steps as it took, so the outbox holds at most as
many outputs as there are sequences, whatever the clients do; the outputs of a sequence keep their order.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Protocol

from llm_engine import EngineLoad, SequenceOutput


class Channel(Protocol):
    """A way to one client, for one sequence or for many."""

    def send(self, outputs: list[SequenceOutput], load: EngineLoad) -> None:
        """Sends outputs of different sequences; called by one thread."""

    def is_cancelled(self) -> bool:
        """Whether the client is gone; called by any thread, may take a while."""


class Outbox:
    """Outputs on their way out; `post` never waits."""

    def __init__(self, on_lost: Callable[[Channel, Exception], None]) -> None:
        self._on_lost = on_lost
        self._pending: dict[Channel, dict[str, SequenceOutput]] = {}
        self._load: EngineLoad | None = None
        self._lock = threading.Lock()
        self._wakes: SimpleQueue[bool] = SimpleQueue()
        """True when there is something to send again, so never many; False for the end."""
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def post(self, outputs: Iterable[tuple[Channel, SequenceOutput]], load: EngineLoad) -> None:
        """Takes a step's outputs; one that meets an unsent one of its sequence is merged into it."""
        with self._lock:
            was_empty = not self._pending
            self._load = load
            for channel, output in outputs:
                waiting = self._pending.setdefault(channel, {})
                before = waiting.get(output.request_id)
                waiting[output.request_id] = output if before is None else merged(before, output)
        if was_empty:
            self._wakes.put(True)

    def close(self, timeout_seconds: float) -> None:
        """Sends what is left, and ends the thread."""
        self._wakes.put(False)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        is_open = True
        while is_open or self._pending:
            is_open = self._wakes.get() and is_open
            with self._lock:
                pending, self._pending, load = self._pending, {}, self._load
            if not pending:
                continue
            assert load is not None
            for channel, outputs in pending.items():
                try:
                    channel.send(list(outputs.values()), load)
                except Exception as error:  # Triton raises bare exceptions for a lost client.
                    self._on_lost(channel, error)


def merged(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Two outputs of one sequence as one."""
    assert first.request_id == second.request_id and not first.finish_reason
    return dataclasses.replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=_joined(first.logprobs, second.logprobs),
        top_token_ids=_joined(first.top_token_ids, second.top_token_ids),
        top_logprobs=_joined(first.top_logprobs, second.top_logprobs),
    )


def _joined(first: list | None, second: list | None) -> list | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second
