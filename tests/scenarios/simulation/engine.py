"""What a request costs: engines with continuous batching, in simulated time.

Both engines here follow one law. A step takes `base + running * per_sequence` seconds, and in it every sequence that
decodes gets one token; what a step computes of prompts, at most `chunk_token_count` tokens, makes it longer by
`tokens / prefill_tokens_per_second`.

`FluidEngine` integrates that law and has an event for each first and last token only, so that hours of a hundred
replicas take seconds. `SteppedEngine` takes each step with the real engine's batcher and block pool; a test compares
the two. Both keep the KV cache's bound: the fluid one takes the room of a whole answer at its start (an engine
without recomputation), the stepped one as the batcher does. Both pause the least urgent sequence for a strictly more
urgent one that finds no slot; it keeps its room and what is computed, and goes on where it was.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from simulation.simulator import Event, Simulator
from tidegate.model.triton_messages import EngineLoad

BLOCK_TOKEN_COUNT = 16

_ALMOST_A_TOKEN = 1e-4
"""Rounding: so much of a token that is missing is none."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine's size and speed.

    Args:
        base_seconds: a step with nothing in it.
        per_sequence_seconds: what each decoding sequence adds to a step.
        chunk_token_count: prompt tokens that a step computes at most.
        kv_token_count: tokens that the KV cache holds.
    """

    slot_count: int = 8
    base_seconds: float = 0.008
    per_sequence_seconds: float = 0.0004
    prefill_tokens_per_second: float = 20_000.0
    chunk_token_count: int = 512
    kv_token_count: int = 1_000_000

    def slower(self, factor: float) -> EngineSpec:
        """The same engine, so many times slower."""
        return replace(
            self,
            base_seconds=self.base_seconds * factor,
            per_sequence_seconds=self.per_sequence_seconds * factor,
            prefill_tokens_per_second=self.prefill_tokens_per_second / factor,
        )

    def step_seconds(self, decoding_count: int, prompt_token_count: float = 0) -> float:
        """How long a step takes."""
        decode = self.base_seconds + self.per_sequence_seconds * decoding_count
        return decode + prompt_token_count / self.prefill_tokens_per_second


@dataclass(slots=True, eq=False)
class Generation:
    """One sequence of an engine.

    Args:
        answer_token_count: what the model will say; nobody but the engine knows it before.
        priority: lower is more urgent.
    """

    prompt_token_count: int
    answer_token_count: int
    priority: int
    on_first_token: Callable[[], None]
    on_end: Callable[[], None]
    order: int = 0
    prefilled_token_count: float = 0.0
    generated_token_count: float = 0.0
    stage: str = "new"
    """new, waiting, prefill, decode, ended."""
    has_room: bool = False
    """Whether the KV cache has its room: since it ran first."""
    starts_at_progress: float = 0.0

    @property
    def token_count(self) -> int:
        """The room that the whole of it takes."""
        return self.prompt_token_count + self.answer_token_count


class Engine(Protocol):
    """What a replica needs of an engine."""

    spec: EngineSpec

    def start(self, generation: Generation) -> None: ...

    def cancel(self, generation: Generation) -> None: ...

    def load(self) -> EngineLoad: ...

    def take_decoded(self) -> tuple[int, float]: ...


@dataclass(slots=True)
class Decoded:
    """Tokens that decoding gave, and the time between them, until somebody asks."""

    token_count: float = 0.0
    gap_seconds: float = 0.0

    def take(self) -> tuple[int, float]:
        whole = int(self.token_count)
        seconds = self.gap_seconds * whole / self.token_count if whole else 0.0
        self.token_count -= whole
        self.gap_seconds -= seconds
        return whole, seconds


class FluidEngine:
    """The law as a flow: between two events all decoding sequences advance at one rate, one prompt at its own."""

    def __init__(self, simulator: Simulator, spec: EngineSpec, on_load: Callable[[], None]) -> None:
        self.spec = spec
        self._simulator = simulator
        self._on_load = on_load
        self._orders = itertools.count()
        self._waiting: list[tuple[int, int, Generation]] = []
        self._prefilling: list[tuple[int, int, Generation]] = []
        self._decoding: list[tuple[float, int, Generation]] = []
        self._waiting_count = self._prefilling_count = self._decoding_count = 0
        self._kv_token_count = 0
        self._progress = 0.0
        self._advanced_at = 0.0
        self._event: Event | None = None
        self._decoded = Decoded()

    @property
    def running_count(self) -> int:
        """Sequences that have a place in the batch."""
        return self._prefilling_count + self._decoding_count

    def load(self) -> EngineLoad:
        """How full it is."""
        used = -(-self._kv_token_count // BLOCK_TOKEN_COUNT)
        total = self.spec.kv_token_count // BLOCK_TOKEN_COUNT
        return EngineLoad(
            running=self.running_count,
            waiting=self._waiting_count,
            max_sequences=self.spec.slot_count,
            max_waiting=self.spec.slot_count,
            free_blocks=max(0, total - used),
            total_blocks=total,
            block_token_count=BLOCK_TOKEN_COUNT,
            preemptions=0,
        )

    def take_decoded(self) -> tuple[int, float]:
        """Tokens decoded since the last call, and the sum of the times between them."""
        self._advance()
        return self._decoded.take()

    def start(self, generation: Generation) -> None:
        """Takes a sequence; it waits here where slots or KV blocks are short."""
        self._advance()
        generation.order = next(self._orders)
        self._wait(generation)
        self._changed()

    def cancel(self, generation: Generation) -> None:
        """Ends a sequence at once, without a word; one that has ended already is left alone."""
        if generation.stage in ("new", "ended"):
            return
        self._advance()
        self._leave(generation)
        self._changed()

    def _leave(self, generation: Generation) -> None:
        if generation.has_room:
            self._kv_token_count -= generation.token_count
        if generation.stage == "waiting":
            self._waiting_count -= 1
        else:
            self._stop(generation)
        generation.stage = "ended"

    def _stop(self, generation: Generation) -> None:
        """Takes a running sequence out of the batch, with what it has computed."""
        if generation.stage == "prefill":
            self._prefilling_count -= 1
        else:
            self._decoding_count -= 1
            generation.generated_token_count = 1 + self._progress - generation.starts_at_progress

    def _pause(self, generation: Generation) -> None:
        """Lets a running sequence wait, at its place by urgency."""
        self._stop(generation)
        self._prefilling = [entry for entry in self._prefilling if entry[2] is not generation]
        self._decoding = [entry for entry in self._decoding if entry[2] is not generation]
        heapq.heapify(self._prefilling)
        heapq.heapify(self._decoding)
        self._wait(generation)

    def _wait(self, generation: Generation) -> None:
        generation.stage = "waiting"
        self._waiting_count += 1
        heapq.heappush(self._waiting, (generation.priority, generation.order, generation))

    def _run(self, generation: Generation) -> None:
        """Takes a sequence into the batch, or takes it in again."""
        if not generation.has_room:
            generation.has_room = True
            self._kv_token_count += generation.token_count
        if generation.generated_token_count:
            self._decode(generation)
        else:
            generation.stage = "prefill"
            self._prefilling_count += 1
            heapq.heappush(self._prefilling, (generation.priority, generation.order, generation))

    def _decode(self, generation: Generation) -> None:
        generation.stage = "decode"
        generation.starts_at_progress = self._progress + 1 - generation.generated_token_count
        self._decoding_count += 1
        last_at = self._progress + max(0.0, generation.answer_token_count - generation.generated_token_count)
        heapq.heappush(self._decoding, (last_at, generation.order, generation))

    def _advance(self) -> None:
        """Lets the flow run from when it was last looked at until now."""
        passed = self._simulator.now - self._advanced_at
        self._advanced_at = self._simulator.now
        if passed <= 0:
            return
        step_seconds, prefill_rate = self._rates()
        if self._decoding_count:
            gained = passed / step_seconds
            self._progress += gained
            self._decoded.token_count += gained * self._decoding_count
            self._decoded.gap_seconds += passed * self._decoding_count
        if (first := self._first(self._prefilling, "prefill")) is not None:
            first.prefilled_token_count += passed * prefill_rate

    def _rates(self) -> tuple[float, float]:
        """Seconds for a decoding sequence's token, and prompt tokens a second, as things are."""
        chunk = self.spec.chunk_token_count if self._prefilling_count else 0
        step_seconds = self.spec.step_seconds(self._decoding_count, chunk)
        return step_seconds, chunk / step_seconds

    def _changed(self) -> None:
        """Lets in what there is room for, and says when something happens next."""
        while (first := self._first(self._waiting, "waiting")) is not None and self._make_room(first):
            heapq.heappop(self._waiting)
            self._waiting_count -= 1
            self._run(first)
        if self._event is not None:
            self._event.cancel()
        seconds = self._next_seconds()
        self._event = None if seconds is None else self._simulator.after(seconds, self._happen)
        self._on_load()

    def _make_room(self, generation: Generation) -> bool:
        """Whether a sequence can run now; pauses the least urgent one for it where only a slot is missing."""
        is_held = generation.has_room or self._kv_token_count + generation.token_count <= self.spec.kv_token_count
        if not (is_held or not self.running_count):
            return False
        if self.running_count < self.spec.slot_count:
            return True
        running = [
            entry[2] for entry in (*self._prefilling, *self._decoding) if entry[2].stage in ("prefill", "decode")
        ]
        last = max(running, key=lambda one: (one.priority, one.order))
        if last.priority <= generation.priority:
            return False
        self._pause(last)
        return True

    def _next_seconds(self) -> float | None:
        step_seconds, prefill_rate = self._rates()
        soonest = None
        if (first := self._first(self._prefilling, "prefill")) is not None:
            soonest = (first.prompt_token_count - first.prefilled_token_count) / prefill_rate
        while self._decoding and self._decoding[0][2].stage != "decode":
            heapq.heappop(self._decoding)
        if self._decoding:
            seconds = (self._decoding[0][0] - self._progress) * step_seconds
            soonest = seconds if soonest is None else min(soonest, seconds)
        return None if soonest is None else max(0.0, soonest)

    def _happen(self) -> None:
        """The first token of a prompt, the last of an answer, or both of several at once."""
        self._event = None
        self._advance()
        told: list[Callable[[], None]] = []
        first = self._first(self._prefilling, "prefill")
        if first is not None and first.prompt_token_count - first.prefilled_token_count < _ALMOST_A_TOKEN:
            told += self._begin_to_decode(first)
        while self._decoding and self._decoding[0][0] <= self._progress + _ALMOST_A_TOKEN:
            _, _, last = heapq.heappop(self._decoding)
            if last.stage == "decode":
                self._leave(last)
                last.generated_token_count = last.answer_token_count
                told.append(last.on_end)
        self._changed()
        for tell in told:
            tell()

    def _begin_to_decode(self, generation: Generation) -> list[Callable[[], None]]:
        heapq.heappop(self._prefilling)
        self._prefilling_count -= 1
        generation.prefilled_token_count = generation.prompt_token_count
        generation.generated_token_count = 1
        self._decode(generation)
        return [generation.on_first_token]

    @staticmethod
    def _first(heap: list[tuple[int, int, Generation]], stage: str) -> Generation | None:
        """The first that is still in this stage; those that left it are dropped."""
        while heap and heap[0][2].stage != stage:
            heapq.heappop(heap)
        return heap[0][2] if heap else None
