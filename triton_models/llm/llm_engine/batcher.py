"""Which tokens of which sequences the next step computes.

Owns the running and the waiting sequences, and who holds which block. Pure: no torch, no clock, no
randomness; the same calls give the same plans. Invariants, between calls:

- a sequence is running or waiting, never both; running and waiting are sorted by urgency;
- a running sequence holds the blocks of all its tokens that were known when it was admitted or last
  planned; a waiting one holds none and has computed nothing;
- a plan never exceeds the step's token budget, and every running sequence whose prompt is computed
  gets its token in every step (decodes first, prompts in chunks in what is left: Sarathi-Serve,
  Agrawal et al., OSDI 2024; sequences join and leave between steps: Orca, Yu et al., OSDI 2022).
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from .block_pool import BlockPool
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepWork:
    """Tokens `start` to `start + count` of a sequence."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens is the last one known, so that a new one follows it."""
        return self.start + self.count == self.sequence.token_count


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, and who lost its blocks for it."""

    work: tuple[StepWork, ...]
    preempted: tuple[str, ...]

    @property
    def token_count(self) -> int:
        """Tokens that the step computes."""
        return sum(work.count for work in self.work)


class Batcher:
    """Continuous batching with chunked prefill and preemption by recompute."""

    def __init__(self, pool: BlockPool, *, max_sequences: int, max_waiting: int, step_token_budget: int) -> None:
        assert step_token_budget >= max_sequences
        self.pool = pool
        self.max_sequences = max_sequences
        self.max_waiting = max_waiting
        self.step_token_budget = step_token_budget
        self.preemption_count = 0
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that hold blocks, the most urgent first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences that hold nothing, the most urgent first."""
        return tuple(self._waiting)

    def holds(self, request_id: str) -> bool:
        """Whether a sequence of this name is here."""
        return request_id in self._by_id

    def can_add(self) -> bool:
        """Whether there is room; what just arrived counts against the running places too."""
        return len(self._by_id) < self.max_sequences + self.max_waiting

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue, at its place by urgency."""
        assert self.can_add() and not self.holds(sequence.request_id)
        assert self.pool.blocks_for(sequence.token_count) <= self.pool.block_count
        self._by_id[sequence.request_id] = sequence
        insort(self._waiting, sequence, key=_urgency)

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, finished or cancelled; its blocks are free at once."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return None
        if sequence.block_ids:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        return sequence

    def plan(self) -> StepPlan:
        """Choose the next step's work; blocks are taken here, so the plan can be carried out."""
        preempted = self._extend_running()
        decodes = [StepWork(s, s.computed_token_count, 1) for s in self._running if _decodes(s)]
        budget = self.step_token_budget - len(decodes)
        prefills = [*self._continued_prefills(budget)]
        budget -= sum(work.count for work in prefills)
        return StepPlan((*decodes, *prefills, *self._admitted_prefills(budget)), tuple(preempted))

    def commit(self, plan: StepPlan) -> None:
        """Note that a plan's tokens are computed."""
        for work in plan.work:
            assert work.sequence.computed_token_count == work.start
            work.sequence.computed_token_count += work.count

    def _extend_running(self) -> list[str]:
        """Give each running sequence the blocks for its newest token, preempting from the tail."""
        preempted: list[str] = []
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            missing = self.pool.blocks_for(sequence.token_count) - len(sequence.block_ids)
            if self.pool.can_take(missing):
                sequence.block_ids += self.pool.take(missing)
                position += 1
            else:
                # The last one may be this one itself: the loop then ends behind the more urgent ones.
                preempted.append(self._preempt_least_urgent())
        return preempted

    def _preempt_least_urgent(self) -> str:
        """Send the least urgent running sequence back to the queue, to be computed again."""
        victim = self._running.pop()
        self._release(victim)
        insort(self._waiting, victim, key=_urgency)
        self.preemption_count += 1
        return victim.request_id

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.block_ids)
        sequence.block_ids = []
        sequence.computed_token_count = 0

    def _continued_prefills(self, budget: int) -> Iterator[StepWork]:
        """Chunks of prompts that an earlier step began."""
        for sequence in self._running:
            if budget and not _decodes(sequence):
                count = min(budget, sequence.pending_token_count)
                budget -= count
                yield StepWork(sequence, sequence.computed_token_count, count)

    def _admitted_prefills(self, budget: int) -> Iterator[StepWork]:
        """First chunks of waiting sequences, strictly in order, so that none is overtaken for ever."""
        while budget and self._waiting and self._can_admit(self._waiting[0]):
            sequence = self._waiting.pop(0)
            sequence.block_ids = self.pool.take(self.pool.blocks_for(sequence.token_count))
            insort(self._running, sequence, key=_urgency)
            count = min(budget, sequence.token_count)
            budget -= count
            yield StepWork(sequence, 0, count)

    def _can_admit(self, sequence: Sequence) -> bool:
        # A free block for each running sequence stays behind, so that a newcomer is not admitted
        # only to be preempted by the next step's growth.
        needed = self.pool.blocks_for(sequence.token_count) + len(self._running)
        return len(self._running) < self.max_sequences and self.pool.can_take(needed)


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.urgency


def _decodes(sequence: Sequence) -> bool:
    return sequence.pending_token_count == 1
