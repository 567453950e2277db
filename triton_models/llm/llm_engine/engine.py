"""The engine: requests in, tokens out, one step at a time.

Owns the request's life: refused or taken, waiting, running, finished. Invariants: one thread calls
it; every request taken ends in exactly one output with a finish reason, unless it is cancelled; a
sequence that fails takes no other with it; which tokens come depends neither on drafts nor on whether a device was
given the next step early. Who runs next is left to `batcher.py`, what is drafted to `drafts.py`, the mathematics to
`model.py`, the choice of a token to `sampler.py`. Read `Engine.step` first.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .batcher import Batcher, StepPlan, StepWork
from .block_pool import BlockPool
from .config import EngineConfig
from .drafts import Drafter
from .errors import (
    DUPLICATE_ID,
    INVALID_VALUE,
    NON_FINITE_LOGITS,
    QUEUE_FULL,
    SCHEMA_TOO_COMPLEX,
    ModelLoadError,
    RequestRefused,
)
from .grammars import Grammar, Grammars, OutputMatcher
from .layouts import parameter_count
from .pacing import StepPacer
from .rank import LoadedRank, Rank
from .ranks import Alone
from .request import EngineLoad, ModelInfo, SequenceOutput, SequenceRequest
from .sampler import Draw, SampledToken, SamplingRow, draw
from .sequence import Sequence
from .step_tensors import RowWork, StepTensors, row_works
from .validation import validated_token_ids
from .weights import TORCH_DTYPES
from .window import window_of

if TYPE_CHECKING:
    from .rank_group import RankGroup


@dataclass(frozen=True)
class _BegunStep:
    """A step that the device has; `works` are those of the plan that get tokens, in the order of the draw's rows."""

    plan: StepPlan
    works: list[StepWork]
    draw: Draw


class Engine:
    """A loaded model with its batch; loading raises ModelLoadError."""

    def __init__(self, config: EngineConfig, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.config = config
        self._clock = clock
        loaded, self._rank = _ranks(config)
        self.model_info = _model_info(config, loaded)
        self._batcher = Batcher(
            BlockPool(loaded.block_count, config.block_token_count),
            max_sequences=config.max_sequences,
            max_waiting=config.max_waiting,
            step_token_budget=config.step_token_budget,
            reuses_prefixes=config.prefix_reuse,
            window=window_of(config),
        )
        self._grammars: Grammars | ModelLoadError = _grammars(config, self.model_info)
        self._matchers: dict[str, OutputMatcher] = {}
        self._drafter = Drafter(config.speculation_tokens, context_token_count=self.model_info.context_token_count)
        self._pacer = StepPacer(config.step_stretch, wide_count=-(-config.max_sequences // 2))
        self._runs_ahead = self._rank.runs_ahead
        self._ahead: _BegunStep | None = None
        """The next step, where a device was given it before the last one's tokens were read."""
        self._arrival_count = 0
        self._step_count = 0
        self._prompt_token_total = 0
        self._generated_token_total = 0
        self._step_seconds_last = 0.0
        self._step_token_count_last = 0

    def step(self, is_unwanted: Callable[[str], bool] = lambda request_id: False) -> list[SequenceOutput]:
        """Compute one step; gives an output for every sequence that got a token or ended.

        Args:
            is_unwanted: asked for each prompt of the step between layers, from this thread. Where it says yes
                the step is given up, with no output and nothing changed: a long prompt whose client has left
                holds its slot no longer than one layer takes. Steps of several ranks are not given up.

        Raises:
            EngineBroken: another rank is gone; no step will work any more.
        """
        if not self.has_work:
            return []
        started = self._clock()
        step, self._ahead = self._ahead or self._begin(is_unwanted), None
        if step is None:
            return []
        if self._runs_ahead:
            self._ahead = self._begin_after(step)
        outputs = self._finish(step)
        self._step_seconds_last = self._clock() - started
        prompt_token_count = step.plan.prompt_token_count
        self._pacer.observe(step.plan.token_count - prompt_token_count, prompt_token_count, self._step_seconds_last)
        return outputs

    def _begin(self, is_unwanted: Callable[[str], bool]) -> "_BegunStep | None":
        """Plan a step and give it to the device; None where it was given up."""
        plan = self._batcher.plan(self._pacer.prompt_token_bound(self._batcher.decode_count))
        if self._may_draft:
            plan = self._batcher.with_drafts(plan, self._drafter.propose)
        tensors = self._rank.lay_out(row_works(plan))
        prompts = [work.sequence.request_id for work in plan.work if work.count > 1]
        # Given up, a step has only written keys and values that the next one writes again.
        logits = self._rank.forward(tensors, give_up=lambda: any(map(is_unwanted, prompts)))
        if logits is None:
            return None
        return self._drawing(plan, tensors, logits)

    def _begin_after(self, step: "_BegunStep") -> "_BegunStep | None":
        """Plan the next step, and give it to the device, while that still computes this one and keeps its tokens there.

        None where these must be known before, or where there may be more to do than their next ones. Who joins in
        the meantime waits for a step more; who ends has had a row in vain.
        """
        plan = self._without_removed(step.plan)
        if any(self._must_know(work.sequence) for work in plan.work):
            return None
        plan_after = self._batcher.plan_after(plan, lambda sequence: self._is_full(sequence, 1))
        if plan_after is None:
            return None
        rows = {id(work.sequence): row for row, work in enumerate(step.works)}
        tensors = self._rank.lay_out_after(
            [RowWork(work.start, [0], work.sequence.block_ids, 1) for work in plan_after.work],
            step.draw.token_ids,
            [rows[id(work.sequence)] for work in plan_after.work],
        )
        logits = self._rank.forward(tensors)
        assert logits is not None
        return self._drawing(plan_after, tensors, logits, awaited_count=1)

    def _drawing(
        self, plan: StepPlan, tensors: StepTensors, logits: torch.Tensor, awaited_count: int = 0
    ) -> "_BegunStep":
        works = [plan.work[place] for place in tensors.sampled]
        rows = [row for work in works for row in self._sampling_rows(work, awaited_count)]
        return _BegunStep(plan, works, draw(logits, rows))

    def _finish(self, step: "_BegunStep") -> list[SequenceOutput]:
        """Wait for a step's tokens and take them; who was removed since it began gets none."""
        sampled = iter(step.draw.read())
        plan = self._without_removed(step.plan)
        self._batcher.commit(plan)
        self._count(plan)
        taken = [(work, list(islice(sampled, 1 + len(work.draft_token_ids)))) for work in step.works]
        outputs = [self._advance(work, tokens) for work, tokens in taken if self._batcher.still_has(work.sequence)]
        return [output for output in outputs if output is not None]

    def _without_removed(self, plan: StepPlan) -> StepPlan:
        return replace(plan, work=tuple(work for work in plan.work if self._batcher.still_has(work.sequence)))

    def _must_know(self, sequence: Sequence) -> bool:
        """Whether what is computed after a sequence's next token depends on more than that it is there."""
        return (
            sequence.request_id in self._matchers
            or sequence.request.sampling.has_penalty
            or (self._may_draft and not self._drafter.rests(sequence))
        )

    @property
    def _may_draft(self) -> bool:
        return len(self._batcher.running) <= self.config.speculation_sequences

    def matcher(self, request: SequenceRequest) -> OutputMatcher | None:
        """What follows the grammar of a request's output, None where it may be any text; for any thread.

        It takes up to half a second, in which steps go on. RequestRefused where the grammar, or what the request
        says of its output, cannot be.
        """
        if not request.sampling.has_grammar:
            return None
        token_ids = validated_token_ids(request, self.model_info)
        grammar = _grammar(request)
        if isinstance(self._grammars, ModelLoadError):
            raise RequestRefused(INVALID_VALUE, f"{grammar.field} cannot be used with this model: {self._grammars}")
        output = token_ids[len(token_ids) - request.prior_output_count :]
        return self._grammars.matcher(grammar, _stop_token_ids(request, self.model_info), output)

    def add(self, request: SequenceRequest, matcher: OutputMatcher | None = None) -> None:
        """Take a request, or raise RequestRefused and leave everything as it was.

        A request whose `max_tokens` reaches beyond the context is taken, and ends with "length" where
        the context does.

        Args:
            matcher: this engine's, of this request; where it has a grammar and this is None, it is made now.
        """
        token_ids = validated_token_ids(request, self.model_info)
        if self._batcher.holds(request.request_id):
            raise RequestRefused(DUPLICATE_ID, f"request_id {request.request_id!r} is in the engine already")
        if not self._batcher.can_add(request.priority):
            raise RequestRefused(
                QUEUE_FULL,
                f"{self.config.max_sequences} places to run and {self.config.max_waiting} to wait are taken",
            )
        if (matcher := matcher or self.matcher(request)) is not None:
            self._matchers[request.request_id] = matcher
        seed = request.sampling.seed
        self._batcher.add(
            Sequence(
                request=request,
                arrival_index=self._arrival_count,
                token_ids=token_ids,
                prompt_token_count=len(token_ids) - request.prior_output_count,
                seed=secrets.randbits(63) if seed is None else seed,
                stop_token_ids=_stop_token_ids(request, self.model_info),
            )
        )
        self._arrival_count += 1

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its blocks at once; False where there is none of this name."""
        return self._remove(request_id)

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Be told, from another thread, as soon as the engine cannot compute any more, also while it has no work."""
        self._rank.watch(on_broken)

    def close(self) -> None:
        """End the processes of the other ranks; the engine computes nothing afterwards."""
        self._rank.close()

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self._batcher.running or self._batcher.waiting)

    @property
    def load(self) -> EngineLoad:
        """How full the engine is, and its totals."""
        pool = self._batcher.pool
        return EngineLoad(
            running=len(self._batcher.running),
            waiting=len(self._batcher.waiting),
            max_sequences=self.config.max_sequences,
            max_waiting=self.config.max_waiting,
            free_block_count=pool.free_count,
            total_block_count=pool.block_count,
            block_token_count=pool.block_token_count,
            step_count=self._step_count,
            preemption_count=self._batcher.preemption_count,
            prompt_token_total=self._prompt_token_total,
            cached_token_total=self._batcher.cached_token_total,
            reuses_prefixes=self.config.prefix_reuse,
            known_block_count=pool.known_count,
            generated_token_total=self._generated_token_total,
            drafted_token_total=self._drafter.drafted_token_total,
            accepted_token_total=self._drafter.accepted_token_total,
            step_seconds_last=self._step_seconds_last,
            step_token_count_last=self._step_token_count_last,
        )

    def _advance(self, work: StepWork, sampled: list[SampledToken]) -> SequenceOutput | None:
        """Append a sequence's new tokens, and end the sequence where it ends; None where the step said nothing.

        Args:
            sampled: what follows its newest token, and then each draft.
        """
        sequence, drafts = work.sequence, work.draft_token_ids
        if not all(token.finite for token in sampled):
            self._rank.clear(self._batcher.spoiled_blocks(sequence))
            if not drafts:
                return self._fail(sequence, NON_FINITE_LOGITS, "the model's logits are not finite")
            # A draft that was not to come may be the reason, and what it wrote is beside what others read.
            self._drafter.give_up(sequence)
            self._batcher.restart(sequence)
            return None
        matcher = self._matchers.get(sequence.request_id)
        accepted = _equal_count(drafts, sampled)
        new: list[SampledToken] = []
        finish_reason = ""
        for token in sampled[: accepted + 1]:
            stopped = token.token_id in sequence.stop_token_ids
            is_whole = not stopped and matcher is not None and matcher.follow(token.token_id)
            if matcher is not None and matcher.fault:
                field = _grammar(sequence.request).field
                return self._fail(sequence, SCHEMA_TOO_COMPLEX, f"{field}: {matcher.fault}")
            if not stopped:
                sequence.token_ids.append(token.token_id)
                new.append(token)
            finish_reason = "stop" if stopped or is_whole else "length" if self._is_full(sequence) else ""
            if finish_reason:
                break
        self._generated_token_total += len(new)
        if drafts:
            self._batcher.accept(sequence, min(accepted, len(new)))
            self._drafter.learn(sequence, len(drafts), accepted)
        if finish_reason:
            self._remove(sequence.request_id)
        wants = sequence.request.sampling.logprobs is not None
        return SequenceOutput(
            request_id=sequence.request_id,
            token_ids=[token.token_id for token in new],
            logprobs=[token.logprob for token in new] if wants else None,
            top_token_ids=[token.top_token_ids for token in new] if wants else None,
            top_logprobs=[token.top_logprobs for token in new] if wants else None,
            finish_reason=finish_reason,
            prompt_token_count=sequence.prompt_token_count,
            output_token_count=sequence.output_token_count,
            cached_token_count=sequence.cached_token_count or 0,
        )

    def _sampling_rows(self, work: StepWork, awaited_count: int = 0) -> Iterator[SamplingRow]:
        """What follows a sequence's newest token is sampled with, and then each draft, as if all before were said.

        Args:
            awaited_count: tokens behind the newest that are not known yet.
        """
        sequence, drafts = work.sequence, list(work.draft_token_ids)
        matcher = self._matchers.get(sequence.request_id)
        for count in range(len(drafts) + 1):
            yield SamplingRow(
                params=sequence.request.sampling,
                seed=sequence.seed,
                token_ids=sequence.token_ids + drafts[:count] if count else sequence.token_ids,
                prompt_token_count=sequence.prompt_token_count,
                allowed=None if matcher is None else matcher.allowed(),
                awaited_count=awaited_count,
            )

    def _fail(self, sequence: Sequence, reason: str, fault: str) -> SequenceOutput:
        """End a sequence that cannot go on; blocks that hold what is not finite were cleaned for the next owner."""
        self._remove(sequence.request_id)
        return SequenceOutput(
            request_id=sequence.request_id,
            token_ids=[],
            finish_reason="error",
            error_reason=reason,
            error_message=f"{fault} at output token {sequence.output_token_count}",
            prompt_token_count=sequence.prompt_token_count,
            output_token_count=sequence.output_token_count,
        )

    def _remove(self, request_id: str) -> bool:
        self._matchers.pop(request_id, None)
        return self._batcher.remove(request_id) is not None

    def _is_full(self, sequence: Sequence, awaited_count: int = 0) -> bool:
        return (
            sequence.output_token_count + awaited_count >= sequence.request.max_tokens
            or sequence.token_count + awaited_count >= self.model_info.context_token_count
        )

    def _count(self, plan: StepPlan) -> None:
        self._step_count += 1
        self._step_token_count_last = plan.token_count
        for work in plan.work:
            self._prompt_token_total += max(0, min(work.count, work.sequence.prompt_token_count - work.start))


def _ranks(config: EngineConfig) -> "tuple[LoadedRank, Rank | RankGroup]":
    """What computes: this process alone, or with one a rank beside it."""
    if config.tensor_parallel_size == 1:
        loaded = LoadedRank(config, 0)
        return loaded, loaded.ready(Alone())
    # Only here, since torch's distributed part takes its time to load.
    from .rank_group import RankGroup

    group = RankGroup(config)
    return group.loaded, group


def _model_info(config: EngineConfig, loaded: LoadedRank) -> ModelInfo:
    architecture = loaded.checkpoint.architecture
    return ModelInfo(
        name=architecture.name,
        architecture=architecture.family,
        vocabulary_size=architecture.vocabulary_size,
        context_token_count=loaded.context_token_count,
        eos_token_ids=architecture.eos_token_ids,
        bos_token_id=architecture.bos_token_id,
        layer_count=architecture.layer_count,
        hidden_size=architecture.hidden_size,
        head_count=architecture.head_count,
        kv_head_count=architecture.kv_head_count,
        parameter_count=parameter_count(architecture, tied=loaded.checkpoint.is_tied),
        weight_dtype=config.dtype,
        compute_dtype=_name_of(loaded.dtype),
        cache_dtype=_name_of(loaded.compute.cached),
        device=config.device,
    )


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, value in TORCH_DTYPES.items() if value == dtype)


def _grammars(config: EngineConfig, model: ModelInfo) -> Grammars | ModelLoadError:
    """What grammars need; a model whose files do not tell its vocabulary goes without."""
    try:
        return Grammars(Path(config.model_path), model)
    except ModelLoadError as error:
        return error


def _equal_count(drafts: tuple[int, ...], sampled: list[SampledToken]) -> int:
    """How many drafts are what was sampled in their places, up to the first that is not."""
    count = 0
    while count < len(drafts) and sampled[count].token_id == drafts[count]:
        count += 1
    return count


def _grammar(request: SequenceRequest) -> Grammar:
    """What the output of a request that has a grammar must follow."""
    sampling = request.sampling
    if sampling.json_schema:
        return Grammar("json_schema", sampling.json_schema)
    return Grammar(sampling.grammar_kind, sampling.grammar)


def _stop_token_ids(request: SequenceRequest, model: ModelInfo) -> frozenset[int]:
    if request.ignore_eos:
        return frozenset()
    return frozenset(request.stop_token_ids or model.eos_token_ids)
