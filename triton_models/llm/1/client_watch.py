"""Asks, beside the engine's thread, what is slow to ask: whether clients are gone, and whether the engine still moves.

Asking Triton about one client takes about 0.2 ms, so it is done at most every WATCH_SECONDS, which bounds how long
the engine works for a client that left without a cancel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from engine_thread import EngineThread
from outbox import Channel

from llm_engine import EngineLoad

WATCH_SECONDS = 0.05

LOAD_SECONDS = 0.5
"""How often the load is published as metrics; each value takes a message to the server."""

HUNG_STEP_SECONDS = 120.0
"""A step that takes longer never ends: the device hangs."""


class ClientWatch:
    """A thread that drops the channels of clients that are gone, publishes the load, and notices a hung step."""

    def __init__(
        self,
        engine_thread: EngineThread,
        *,
        channels: Callable[[], Iterable[Channel]],
        on_gone: Callable[[Channel], None],
        on_load: Callable[[EngineLoad], None],
        on_hung: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        self._engine_thread = engine_thread
        self._channels = channels
        self._on_gone = on_gone
        self._on_load = on_load
        self._on_hung = on_hung
        self._log = log
        self._next_load = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client-watch", daemon=True)
        self._thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Ends the thread."""
        self._closing.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._closing.wait(WATCH_SECONDS):
            try:
                self._look(time.monotonic())
            except Exception as error:  # A server that is shutting down answers with anything.
                self._log(f"cannot ask the server: {error!r}")
            if self._engine_thread.step_seconds(time.monotonic()) > HUNG_STEP_SECONDS:
                self._on_hung(f"a step takes longer than {HUNG_STEP_SECONDS:g} s")

    def _look(self, now: float) -> None:
        for channel in self._channels():
            if channel.is_cancelled():
                self._on_gone(channel)
        if now >= self._next_load:
            self._next_load = now + LOAD_SECONDS
            self._on_load(self._engine_thread.load)
