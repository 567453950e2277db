"""Which tokens of which sequences the next step computes.

Owns the running and the waiting sequences, and who holds which block. Pure: no torch, no clock, no
randomness; the same calls give the same plans. Invariants, between calls:

- a sequence is running or waiting, never both; running and waiting are sorted by urgency;
- a running sequence holds the blocks of all its tokens that were known when it was admitted or last
  planned; a waiting one holds none and has computed nothing, or it is *paused*: it ran, and keeps its
  blocks and what is computed until somebody needs the blocks, so that it goes on where it was;
- with an attention window, whatever holds blocks lacks exactly those that the window hides from its next
  token, and beyond the window's beginning a prompt holds those of its next step alone;
- every paused sequence is less urgent than every running one: only the least urgent running one is
  paused, only for a waiting one of strictly lower priority number, and who waits is admitted strictly
  in order;
- a sequence that is admitted begins with the blocks of its prompt that are known, where prefixes are reused,
  and computes one token at least; a block becomes known when it is full and computed, so that none is
  shared that anybody still writes to;
- blocks that are needed and not free come from the least urgent paused sequence first, then, to let a
  running one grow, from the least urgent running one; whoever gives up blocks gives up all, and is
  computed again, which loses no token that is known;
- drafts get what is left of a step's budget and of the free blocks, so that nobody waits or gives way for
  one; blocks that a sequence has beyond its own tokens go back with the next plan, and a draft counts as
  computed only once it is the sequence's own token;
- a plan never exceeds the step's token budget, nor LESSER_PROMPT_TOKENS of prompts that are less urgent than something
  else here (LESSER_BESIDE_TOKENS beside a prompt that is not), nor, where something decodes, the bound on tokens of
  prompts that are not more urgent than some of it; and every running sequence whose prompt is computed gets its token
  in every step (decodes first, prompts in chunks in what is left: Sarathi-Serve, Agrawal et al., OSDI 2024; sequences
  join and leave between steps: Orca, Yu et al., OSDI 2022).
"""

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .block_pool import BlockPool
from .sequence import Sequence
from .window import FULL, Window

LESSER_PROMPT_TOKENS = 128
"""Of prompts that are less urgent than something else here, in a step: whoever is urgent and comes in its midst waits
for its end."""

LESSER_BESIDE_TOKENS = 32
"""The same in a step with a prompt that is as urgent as anything here, and whose first token comes with its end."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """Tokens `start` to `start + count` of a sequence, and after them drafts, which it may say next."""

    sequence: Sequence
    start: int
    count: int
    draft_token_ids: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens is the last one known, so that a new one follows it."""
        return self.start + self.count == self.sequence.token_count

    @property
    def row_count(self) -> int:
        """Tokens that the step computes of it, drafts included."""
        return self.count + len(self.draft_token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, and who lost its blocks for it."""

    work: tuple[StepWork, ...]
    preempted: tuple[str, ...]

    @property
    def token_count(self) -> int:
        """Tokens that the step computes."""
        return sum(work.row_count for work in self.work)

    @property
    def prompt_token_count(self) -> int:
        """Those of prompts; the others are decodes and their drafts, which cost the same."""
        return sum(work.count for work in self.work if work.count > 1)


class Batcher:
    """Continuous batching with chunked prefill, pausing by priority, and preemption by recompute."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_waiting: int,
        step_token_budget: int,
        reuses_prefixes: bool = False,
        window: Window = FULL,
    ) -> None:
        assert step_token_budget >= max_sequences
        self.pool = pool
        self.reuses_prefixes = reuses_prefixes
        self.window = window
        self.max_sequences = max_sequences
        self.max_waiting = max_waiting
        self.step_token_budget = step_token_budget
        self._prompt_token_bound: int | None = None
        self._bound_from: int | None = None
        """Of the least urgent decode, the priority; prompts of lower ones are not bound. None: nothing decodes."""
        self._most_urgent = 0
        self.preemption_count = 0
        self.cached_token_total = 0
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that hold blocks, the most urgent first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences that do not run, the most urgent first; those that hold blocks are paused."""
        return tuple(self._waiting)

    def holds(self, request_id: str) -> bool:
        """Whether a sequence of this name is here."""
        return request_id in self._by_id

    def still_has(self, sequence: Sequence) -> bool:
        """Whether it was not removed."""
        return self._by_id.get(sequence.request_id) is sequence

    def can_add(self, priority: int | None = None) -> bool:
        """Whether there is room; what just arrived counts against the running places too.

        Args:
            priority: the newcomer's. Where all places are taken, there is one more for each running sequence that
                is strictly less urgent and not yet to be paused for another one, so that whoever may pause one is
                never refused for want of a place to wait.
        """
        if len(self._by_id) < self.max_sequences + self.max_waiting:
            return True
        if priority is None or len(self._by_id) >= 2 * self.max_sequences + self.max_waiting:
            return False
        pausable_count = sum(sequence.request.priority > priority for sequence in self._running)
        ahead_count = sum(sequence.request.priority <= priority for sequence in self._waiting)
        return ahead_count < pausable_count

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue, at its place by urgency."""
        assert self.can_add(sequence.request.priority) and not self.holds(sequence.request_id)
        assert self._needed_block_count(sequence, 0) <= self.pool.block_count
        self._by_id[sequence.request_id] = sequence
        insort(self._waiting, sequence, key=_urgency)

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, finished or cancelled; its blocks are free at once."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return None
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        self._release(sequence)
        return sequence

    def spoiled_blocks(self, sequence: Sequence) -> list[int]:
        """Let nobody find a sequence's blocks any more, and give those that it alone owns, to be cleaned."""
        self.pool.forget(sequence.block_ids)
        return [block for block in sequence.block_ids if not self.pool.is_shared(block)]

    @property
    def decode_count(self) -> int:
        """Running sequences that get a token in the next step, whatever else is in it."""
        return sum(map(_decodes, self._running))

    def plan(self, prompt_token_bound: int | None = None) -> StepPlan:
        """Choose the next step's work; blocks are taken here, so the plan can be carried out.

        Args:
            prompt_token_bound: tokens of prompts at most, where a running sequence decodes; those count apart that
                are more urgent than one that does, since it may be held up for them.
        """
        preempted = self._extend_running()
        self._prompt_token_bound = prompt_token_bound
        self._bound_from = max((s.request.priority for s in self._running if _decodes(s)), default=None)
        self._most_urgent = min((s.request.priority for s in (*self._running[:1], *self._waiting[:1])), default=0)
        prefills: list[StepWork] = []
        begun = [sequence for sequence in self._running if not _decodes(sequence)]
        while True:
            head = self._next_admissible(begun, prefills)
            if head is not None:
                preempted += self._admit(head)
                begun = [sequence for sequence in begun if sequence in self._running]
            elif begun and self._budget(begun[0], prefills) > 0:
                head = begun.pop(0)
            else:
                break
            if not _decodes(head):
                budget = self._budget(head, prefills)
                assert budget > 0
                prefills.append(StepWork(head, head.computed_token_count, min(budget, head.pending_token_count)))
        decodes = [StepWork(s, s.computed_token_count, 1) for s in self._running if _decodes(s)]
        return StepPlan((*decodes, *prefills), tuple(preempted))

    def with_drafts(self, plan: StepPlan, propose: Callable[[Sequence, int], list[int]]) -> StepPlan:
        """The plan, with drafts beside its decodes as far as there is room.

        Args:
            propose: gives a sequence's drafts, and at most so many.
        """
        left = self.step_token_budget - plan.token_count
        works = list(plan.work)
        for place, work in enumerate(works):
            drafts = propose(work.sequence, left) if left and work.count == 1 and work.samples else []
            missing = self._missing_block_count(work.sequence, len(drafts))
            if drafts and self.pool.can_take(missing):
                work.sequence.block_ids += self.pool.take(missing)
                works[place] = replace(work, draft_token_ids=tuple(drafts))
                left -= len(drafts)
        return replace(plan, work=tuple(works))

    def plan_after(self, plan: StepPlan, ends: Callable[[Sequence], bool]) -> StepPlan | None:
        """The step after one whose tokens are not known yet: one more of each sequence that goes on.

        None where there may be more to do than that: a prompt, a sequence that could be admitted, blocks to be
        taken from others. What the plan says stays right whoever is removed before it is committed.

        Args:
            plan: not committed yet.
            ends: whether a sequence has its last token with it.
        """
        is_decoding = len(plan.work) == len(self._running) and all(w.samples and w.row_count == 1 for w in plan.work)
        if not is_decoding or self.window != FULL or self._next_admissible([], []) is not None:
            return None
        going_on = [work for work in plan.work if not ends(work.sequence)]
        missing = [self._missing_block_count(work.sequence, 1) for work in going_on]
        if not going_on or not self.pool.can_take(sum(missing)):
            return None
        for work, count in zip(going_on, missing, strict=True):
            work.sequence.block_ids += self.pool.take(count)
        return StepPlan(tuple(StepWork(work.sequence, work.start + 1, 1) for work in going_on), ())

    def commit(self, plan: StepPlan) -> None:
        """Note that a plan's tokens are computed; of its drafts that is yet to be seen."""
        for work in plan.work:
            assert work.sequence.computed_token_count == work.start
            self._note_computed(work.sequence, work.count)

    def accept(self, sequence: Sequence, count: int) -> None:
        """Note that so many tokens, computed as drafts in the step just committed, are the sequence's own now."""
        self._note_computed(sequence, count)

    def restart(self, sequence: Sequence) -> None:
        """Let a running sequence be computed again from its beginning."""
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_urgency)
        self._preempt(sequence)

    def _extend_running(self) -> list[str]:
        """Give each running sequence the blocks for its newest token, from the paused and then from the tail."""
        for sequence in self._running:
            needed = self._needed_block_count(sequence, sequence.computed_token_count)
            self.pool.give_back(sequence.block_ids[needed:])
            del sequence.block_ids[needed:]
        preempted: list[str] = []
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            missing = self._missing_block_count(sequence)
            if self.pool.can_take(missing):
                sequence.block_ids += self.pool.take(missing)
                position += 1
            else:
                # The last one may be this one itself: the loop then ends behind the more urgent ones.
                preempted.append(self._preempt(self._least_urgent_paused() or self._pause_least_urgent()))
        return preempted

    def _budget(self, head: Sequence, prefills: list[StepWork], paused: Iterable[Sequence] = ()) -> int:
        """Tokens of a prompt that the step can still compute, beside the decodes and what is planned of prompts.

        Args:
            paused: running sequences that would not run in it.
        """
        planned = sum(work.count for work in prefills)
        left = self.step_token_budget - self.decode_count + sum(map(_decodes, paused)) - planned
        if self._is_lesser(head):
            lesser = [work.count for work in prefills if self._is_lesser(work.sequence)]
            most = LESSER_PROMPT_TOKENS if len(lesser) == len(prefills) else LESSER_BESIDE_TOKENS
            left = min(left, most - sum(lesser))
        if self._prompt_token_bound is not None and self._is_bound(head):
            left = min(left, self._prompt_token_bound - sum(w.count for w in prefills if self._is_bound(w.sequence)))
        return left

    def _is_lesser(self, prompt: Sequence) -> bool:
        return prompt.request.priority > self._most_urgent

    def _is_bound(self, prompt: Sequence) -> bool:
        return self._bound_from is not None and prompt.request.priority >= self._bound_from

    def _next_admissible(self, begun: list[Sequence], prefills: list[StepWork]) -> Sequence | None:
        """The first that waits, where it can run in this step and no begun prompt comes before it."""
        if not self._waiting:
            return None
        head = self._waiting[0]
        if begun and begun[0].request.priority <= head.request.priority:
            return None
        victims = self._victims(head)
        if victims is None:
            return None
        return head if self._budget(head, prefills, victims) > 0 else None

    def _victims(self, head: Sequence) -> list[Sequence] | None:
        """Running sequences to pause for a waiting one, the least urgent first; None where it has to wait.

        A free block for each running sequence stays behind, so that a newcomer is not admitted only to be
        preempted by the next step's growth. Blocks of paused sequences count as free.
        """
        victims: list[Sequence] = []
        rest = list(self._running)
        paused = [sequence for sequence in self._waiting if sequence is not head]
        known, computed_count = self._known_blocks(head)
        missing = self._needed_block_count(head, computed_count) - len(head.block_ids)
        missing -= sum(map(self.pool.is_taken, known))
        while len(rest) >= self.max_sequences or self._available(paused, victims, known) < missing + len(rest):
            if not rest or rest[-1].request.priority <= head.request.priority:
                return None
            victims.append(rest.pop())
        return victims

    def _available(self, paused: list[Sequence], victims: list[Sequence], kept: list[int]) -> int:
        """Blocks that are free, or would be if these sequences lost theirs and somebody still owned `kept`."""
        owners = [sequence.block_ids for sequence in (*paused, *victims)]
        if not self.reuses_prefixes:
            return self.pool.free_count + sum(map(len, owners))
        shared = set(kept)
        return self.pool.free_count + self.pool.freed_by([b for b in blocks if b not in shared] for blocks in owners)

    def _admit(self, head: Sequence) -> list[str]:
        """Let the first that waits run; gives who lost its blocks for it."""
        for _ in self._victims(head) or ():
            self._pause_least_urgent()
        self._waiting.remove(head)
        self._share_known(head)
        preempted: list[str] = []
        missing = self._missing_block_count(head)
        while not self.pool.can_take(missing):
            paused = self._least_urgent_paused()
            assert paused is not None
            preempted.append(self._preempt(paused))
        head.block_ids += self.pool.take(missing)
        insort(self._running, head, key=_urgency)
        return preempted

    def _known_blocks(self, sequence: Sequence) -> tuple[list[int], int]:
        """The known blocks that a sequence without any can begin with, but for hidden ones, and how many tokens are
        then computed; one is left to compute."""
        if not self.reuses_prefixes or sequence.block_ids:
            return [], sequence.computed_token_count
        size = self.pool.block_token_count
        known = self.pool.find(sequence.block_keys((sequence.token_count - 1) // size, size))
        hidden = self.window.hidden_blocks(len(known) * size, size)
        return known[: hidden.start] + known[hidden.stop :], len(known) * size

    def _share_known(self, sequence: Sequence) -> None:
        """Begin with the blocks that are known."""
        known, sequence.computed_token_count = self._known_blocks(sequence)
        self.pool.share(known)
        sequence.block_ids += known
        if sequence.cached_token_count is None:
            sequence.cached_token_count = sequence.computed_token_count
            self.cached_token_total += sequence.computed_token_count

    def _note_computed(self, sequence: Sequence, count: int) -> None:
        """Count a sequence's next tokens as computed, and let the blocks be found that they have filled."""
        size = self.pool.block_token_count
        hidden = self.window.hidden_blocks(sequence.computed_token_count, size)
        first = sequence.computed_token_count // size
        sequence.computed_token_count += count
        last = sequence.computed_token_count // size
        if self.reuses_prefixes and first < last:
            keys = sequence.block_keys(last, size)
            for index in range(first, last):
                self.pool.know(sequence.block_ids[index - len(hidden)], keys[index])
        self._give_back_hidden(sequence, len(hidden))

    def _give_back_hidden(self, sequence: Sequence, before: int) -> None:
        """Give back the blocks that the window has just left behind; known ones can still be found.

        Args:
            before: how many it had left behind already.
        """
        hidden = self.window.hidden_blocks(sequence.computed_token_count, self.pool.block_token_count)
        newly = hidden[before:]
        if newly:
            end = hidden.start + len(newly)
            self.pool.give_back(sequence.block_ids[hidden.start : end])
            sequence.block_ids = sequence.block_ids[: hidden.start] + sequence.block_ids[end:]

    def _pause_least_urgent(self) -> Sequence:
        """Send the least urgent running sequence back to the queue, with its blocks."""
        victim = self._running.pop()
        insort(self._waiting, victim, key=_urgency)
        return victim

    def _least_urgent_paused(self) -> Sequence | None:
        return next((sequence for sequence in reversed(self._waiting) if sequence.block_ids), None)

    def _preempt(self, sequence: Sequence) -> str:
        """Take a waiting sequence's blocks; it will be computed again."""
        self._release(sequence)
        self.preemption_count += 1
        return sequence.request_id

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.block_ids)
        sequence.block_ids = []
        sequence.computed_token_count = 0

    def _missing_block_count(self, sequence: Sequence, draft_count: int = 0) -> int:
        needed = self._needed_block_count(sequence, sequence.computed_token_count, draft_count)
        return needed - len(sequence.block_ids)

    def _needed_block_count(self, sequence: Sequence, computed_count: int, draft_count: int = 0) -> int:
        """Blocks that it holds, when so many tokens are computed: of all its tokens that a next step may compute."""
        reached = max(computed_count, self.window.begins_at) + self.step_token_budget
        hidden = self.window.hidden_blocks(computed_count, self.pool.block_token_count)
        return self.pool.blocks_for(min(sequence.token_count + draft_count, reached)) - len(hidden)


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.urgency


def _decodes(sequence: Sequence) -> bool:
    return sequence.pending_token_count == 1
