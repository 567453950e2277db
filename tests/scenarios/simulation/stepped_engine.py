"""The engine of `engine.py` taken step by step, by the real engine's batcher and block pool."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from simulation.engine import BLOCK_TOKEN_COUNT, Decoded, EngineSpec, Generation
from simulation.simulator import Simulator
from tidegate.model.triton_messages import EngineLoad

sys.path.append(str(Path(__file__).resolve().parents[3] / "triton_models" / "llm"))

from llm_engine.batcher import Batcher, StepPlan, StepWork
from llm_engine.block_pool import BlockPool
from llm_engine.request import SequenceRequest
from llm_engine.sequence import Sequence

MAX_WAITING: Final = 256


@dataclass(slots=True, eq=False)
class _Running:
    generation: Generation
    sequence: Sequence
    last_token_at: float | None = None


class SteppedEngine:
    """Slower to simulate than the fluid one by the tokens of an answer; preempts as the real one does."""

    def __init__(self, simulator: Simulator, spec: EngineSpec, on_load: Callable[[], None]) -> None:
        self.spec = spec
        self.batcher = Batcher(
            BlockPool(spec.kv_token_count // BLOCK_TOKEN_COUNT, BLOCK_TOKEN_COUNT),
            max_sequences=spec.slot_count,
            max_waiting=MAX_WAITING,
            step_token_budget=spec.chunk_token_count + spec.slot_count,
        )
        self._simulator = simulator
        self._on_load = on_load
        self._orders = itertools.count()
        self._by_id: dict[str, _Running] = {}
        self._is_stepping = False
        self._decoded = Decoded()

    def load(self) -> EngineLoad:
        """How full it is."""
        batcher = self.batcher
        return EngineLoad(
            running=len(batcher.running),
            waiting=max(0, len(batcher.waiting) - max(0, batcher.max_sequences - len(batcher.running))),
            max_sequences=batcher.max_sequences,
            max_waiting=batcher.max_waiting,
            free_blocks=batcher.pool.free_count,
            total_blocks=batcher.pool.block_count,
            block_token_count=BLOCK_TOKEN_COUNT,
            preemptions=batcher.preemption_count,
        )

    def take_decoded(self) -> tuple[int, float]:
        """Tokens decoded since the last call, and the sum of the times between them."""
        return self._decoded.take()

    def start(self, generation: Generation) -> None:
        """Takes a sequence."""
        generation.order = next(self._orders)
        generation.stage = "waiting"
        name = str(generation.order)
        tokens = [0] * generation.prompt_token_count
        request = SequenceRequest(
            request_id=name, token_ids=tokens, max_tokens=generation.answer_token_count, priority=generation.priority
        )
        sequence = Sequence(request, generation.order, tokens, len(tokens), 0, frozenset())
        self._by_id[name] = _Running(generation, sequence)
        self.batcher.add(sequence)
        self._on_load()
        self._step()

    def cancel(self, generation: Generation) -> None:
        """Ends a sequence at once, without a word; one that has ended already is left alone."""
        if generation.stage in ("new", "ended"):
            return
        generation.stage = "ended"
        del self._by_id[str(generation.order)]
        self.batcher.remove(str(generation.order))
        self._on_load()

    def _step(self) -> None:
        """Begins a step, unless one is under way or there is nothing to do."""
        if self._is_stepping or not self._by_id:
            return
        plan = self.batcher.plan()
        decoding = [work for work in plan.work if work.sequence.output_token_count and work.count == 1]
        self._is_stepping = True
        seconds = self.spec.step_seconds(len(decoding), plan.token_count - len(decoding))
        self._simulator.after(seconds, self._end_step, plan)

    def _end_step(self, plan: StepPlan) -> None:
        self._is_stepping = False
        alive = tuple(work for work in plan.work if self.batcher.holds(work.sequence.request_id))
        self.batcher.commit(StepPlan(alive, ()))
        told = [tell for work in alive for tell in self._give_token(work)]
        self._on_load()
        for tell in told:
            tell()
        self._step()

    def _give_token(self, work: StepWork) -> list[Callable[[], None]]:
        running = self._by_id[work.sequence.request_id]
        generation = running.generation
        if not work.sequence.output_token_count:
            generation.prefilled_token_count = work.sequence.computed_token_count
        if not work.samples:
            return []
        work.sequence.token_ids.append(0)
        generation.generated_token_count += 1
        told = [generation.on_first_token] if running.last_token_at is None else []
        if running.last_token_at is not None:
            self._decoded.token_count += 1
            self._decoded.gap_seconds += self._simulator.now - running.last_token_at
        running.last_token_at = self._simulator.now
        if generation.generated_token_count >= generation.answer_token_count:
            self.cancel(generation)
            told.append(generation.on_end)
        return told
