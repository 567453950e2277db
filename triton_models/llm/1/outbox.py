"""Carries outputs from the engine's thread to the clients on a thread of its own, and not each step's by itself.

Handing a response to Triton takes some 0.2 ms, which the engine must not wait for, and each output in it as much again
of those who carry it on to its client, on one machine of the very cores that compute. Invariants: a sequence's first
and last output leave at once, and so does news of how many run and wait; others gather, for
`SECONDS_PER_OUTPUT` of each that left the last time and together for `max_interval_seconds` at most. What is not sent
yet of one sequence is one output, merged from as many steps as it took, and one more where it fails: nobody looks for
tokens in a failure. So the outbox holds at most twice as many outputs as there are sequences, whatever the clients
do. The outputs of a sequence keep their order, and where all fail at once, tokens come before failures.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Protocol

from llm_engine import EngineLoad, SequenceOutput

_FAILURES = ("error", "cancelled")
"""What is said of a sequence's end, and not of its tokens."""

SECONDS_PER_OUTPUT = 0.002
"""How long an output makes the next ones wait: to carry one takes a mesh and its client some 0.3 ms of a core."""


class Channel(Protocol):
    """A way to one client, for one sequence or for many."""

    def send(self, outputs: list[SequenceOutput], load: EngineLoad) -> None:
        """Sends outputs of different sequences; called by one thread."""

    def is_cancelled(self) -> bool:
        """Whether the client is gone; called by any thread, may take a while."""


class Outbox:
    """Outputs on their way out; `post` never waits.

    Args:
        on_lost: told of a channel that raised, on the outbox's thread.
        max_interval_seconds: for how long an output waits for others at most; 0 sends each step's at once.
    """

    def __init__(self, on_lost: Callable[[Channel, Exception], None], max_interval_seconds: float) -> None:
        self._on_lost = on_lost
        self._max_interval_seconds = max_interval_seconds
        self._pending: dict[Channel, dict[tuple[bool, str], SequenceOutput]] = {}
        """By whether it tells of a failure, and of which sequence."""
        self._urgent: set[str] = set()
        """Sequences with a first or last output in `_pending`."""
        self._begun: set[str] = set()
        """Sequences that have had an output, and not their last."""
        self._due = 0.0
        """When all that is pending leaves, by the monotonic clock; 0 is at once."""
        self._load: EngineLoad | None = None
        self._told_counts = (0, 0)
        """How many run and wait, as was sent last."""
        self._lock = threading.Lock()
        self._wakes: SimpleQueue[bool] = SimpleQueue()
        """True when there is something to send, or something urgent, again, so never many; False for the end."""
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def post(self, outputs: Iterable[tuple[Channel, SequenceOutput]], load: EngineLoad) -> None:
        """Takes a step's outputs; one that meets an unsent one of its sequence is merged into it."""
        with self._lock:
            was_empty, was_hurried = not self._pending, self._is_hurried
            self._load = load
            for channel, output in outputs:
                name = output.request_id
                waiting = self._pending.setdefault(channel, {})
                key = (output.finish_reason in _FAILURES, name)
                before = waiting.get(key)
                waiting[key] = output if before is None else merged(before, output)
                if output.finish_reason or name not in self._begun:
                    self._urgent.add(name)
                (self._begun.discard if output.finish_reason else self._begun.add)(name)
            if not self._urgent and (load.running, load.waiting) != self._told_counts:
                self._due = 0.0
            has_news = was_empty or (self._is_hurried and not was_hurried)
        if has_news:
            self._wakes.put(True)

    @property
    def _is_hurried(self) -> bool:
        """Whether something is to leave at once."""
        return bool(self._urgent) or not self._due

    def close(self, timeout_seconds: float) -> None:
        """Sends what is left, and ends the thread."""
        self._wakes.put(False)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        is_open = True
        while is_open or self._pending:
            is_open = self._wait() and is_open
            taken, load = self._take(is_open)
            for channel, outputs in taken.items():
                assert load is not None
                try:
                    channel.send(outputs, load)
                except Exception as error:  # Triton raises bare exceptions for a lost client.
                    self._on_lost(channel, error)

    def _wait(self) -> bool:
        """Until there is something to do; False for the end."""
        try:
            return self._wakes.get(timeout=max(0.0, self._due - time.monotonic()) if self._pending else None)
        except Empty:
            return True

    def _take(self, is_open: bool) -> tuple[dict[Channel, list[SequenceOutput]], EngineLoad | None]:
        """What is to be sent now, all or what is urgent, and the load after it."""
        with self._lock:
            now = time.monotonic()
            is_due = now >= self._due or not is_open
            taken = {}
            for channel, waiting in list(self._pending.items()):
                keys = [key for key in waiting if is_due or key[1] in self._urgent]
                if keys:
                    taken[channel] = [waiting.pop(key) for key in keys]
                if not waiting:
                    del self._pending[channel]
            self._urgent.clear()
            if taken and self._load is not None:
                self._told_counts = (self._load.running, self._load.waiting)
            if is_due:
                worth = SECONDS_PER_OUTPUT * sum(map(len, taken.values()))
                self._due = now + min(worth, self._max_interval_seconds)
            return taken, self._load


def merged(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Two outputs of one sequence as one; what the first has goes before what the second's lists have."""
    assert first.request_id == second.request_id and not first.finish_reason
    second.token_ids[:0] = first.token_ids
    if first.logprobs is None:
        return second
    return dataclasses.replace(
        second,
        logprobs=_joined(first.logprobs, second.logprobs),
        top_token_ids=_joined(first.top_token_ids, second.top_token_ids),
        top_logprobs=_joined(first.top_logprobs, second.top_logprobs),
    )


def _joined(first: list | None, second: list | None) -> list:
    return (first or []) + (second or [])
