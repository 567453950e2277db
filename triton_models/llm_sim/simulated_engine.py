"""An engine that takes the time of a real one and makes up its tokens.

The batch, the KV blocks, the refusals and the ends of answers are those of `llm_engine`: the same Batcher, BlockPool
and validation. Only the mathematics is missing: a step waits for the moment at which a real one would be done, and
each token is `answer.answer_token`. Invariants: one thread calls it; every request taken ends in exactly one output
with a finish reason, unless it is cancelled; steps that follow each other end at moments that add up exactly, however
late the operating system wakes the thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from answer import answer_seed, answer_table, answer_token, natural_token_count
from simulation_config import SimulationConfig
from vocabulary import read_model_files

from llm_engine import EngineLoad, ModelInfo, ModelLoadError, RequestRefused, SequenceOutput, SequenceRequest
from llm_engine.architecture import Architecture
from llm_engine.batcher import Batcher, StepPlan
from llm_engine.block_pool import BlockPool
from llm_engine.errors import DUPLICATE_ID, INVALID_VALUE, QUEUE_FULL
from llm_engine.pacing import StepPacer
from llm_engine.sequence import Sequence
from llm_engine.validation import validated_token_ids

MAX_CATCH_UP_SECONDS = 0.25
"""A thread that was kept from the processor for longer does not make up for all of it with a burst of steps."""

GIVE_UP_SECONDS = 0.01
"""How often a step with a prompt asks whether the prompt's client is still there."""

UNLIKELY_LOGPROB = -20.0
"""Of tokens that were not chosen; the chosen one is certain, so its logarithm is 0."""


@dataclass(slots=True, eq=False)
class SimulatedSequence(Sequence):
    """A sequence whose `seed` is its prompt's, and where its answer ends by itself."""

    natural_token_count: int | None = None


class SimulatedEngine:
    """The interface of `llm_engine.Engine`; loading raises ModelLoadError or ValueError.

    Args:
        clock: seconds; only differences count.
        sleep: waits so many seconds of that clock.
    """

    def __init__(
        self,
        config: SimulationConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config = config
        self._clock = clock
        self._sleep = sleep
        architecture, token_texts = read_model_files(Path(config.model_path))
        self.answer_table = answer_table(token_texts)
        self.model_info = _model_info(config, architecture)
        self._service_time = config.service_time
        self._batcher = Batcher(
            BlockPool(config.kv_block_count, config.block_token_count),
            max_sequences=config.max_sequences,
            max_waiting=config.max_waiting,
            step_token_budget=config.step_token_budget,
        )
        self._pacer = StepPacer(config.step_stretch, wide_count=-(-config.max_sequences // 2))
        self._ready_at: float | None = None
        """When the last step was over by the service time; None after an idle moment."""
        self._arrival_count = 0
        self._step_count = 0
        self._prompt_token_total = 0
        self._generated_token_total = 0
        self._step_seconds_last = 0.0
        self._step_token_count_last = 0

    def step(self, is_unwanted: Callable[[str], bool] = lambda request_id: False) -> list[SequenceOutput]:
        """Waits as long as one step takes; gives an output for every sequence that got a token or ended.

        Args:
            is_unwanted: asked for each prompt of the step, from this thread. Where it says yes the step is given up,
                with no output.
        """
        if not self.has_work:
            self._ready_at = None
            return []
        plan = self._batcher.plan(self._pacer.prompt_token_bound(self._batcher.decode_count))
        prompt_token_count = plan.prompt_token_count
        decode_count = plan.token_count - prompt_token_count
        seconds = self._service_time.step_seconds(decode_count, prompt_token_count)
        started = self._start_moment()
        prompts = [work.sequence.request_id for work in plan.work if work.count > 1]
        if not self._wait_until(started + seconds, prompts, is_unwanted):
            self._ready_at = self._clock()
            return []
        self._ready_at = started + seconds
        self._pacer.observe(decode_count, prompt_token_count, seconds)
        self._batcher.commit(plan)
        self._count(plan, seconds)
        outputs = [self._advance(work.sequence) for work in plan.work if work.samples]
        if not self.has_work:
            self._ready_at = None
        return outputs

    def matcher(self, request: SequenceRequest) -> None:
        """It follows no grammar: `add` refuses them."""

    def add(self, request: SequenceRequest, matcher: None = None) -> None:
        """Take a request, or raise RequestRefused and leave everything as it was."""
        token_ids = validated_token_ids(request, self.model_info)
        if request.sampling.json_schema:
            raise RequestRefused(INVALID_VALUE, "json_schema cannot be used: a simulated engine writes no JSON")
        if request.sampling.grammar:
            raise RequestRefused(INVALID_VALUE, "grammar cannot be used: a simulated engine follows none")
        if self._batcher.holds(request.request_id):
            raise RequestRefused(DUPLICATE_ID, f"request_id {request.request_id!r} is in the engine already")
        if not self._batcher.can_add(request.priority):
            raise RequestRefused(
                QUEUE_FULL,
                f"{self.config.max_sequences} places to run and {self.config.max_waiting} to wait are taken",
            )
        prompt_token_count = len(token_ids) - request.prior_output_count
        seed = answer_seed(token_ids[:prompt_token_count])
        self._batcher.add(
            SimulatedSequence(
                request=request,
                arrival_index=self._arrival_count,
                token_ids=token_ids,
                prompt_token_count=prompt_token_count,
                seed=seed,
                stop_token_ids=frozenset(() if request.ignore_eos else request.stop_token_ids),
                natural_token_count=None if request.ignore_eos else self._natural_token_count(seed),
            )
        )
        self._arrival_count += 1

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its blocks at once; False where there is none of this name."""
        return self._batcher.remove(request_id) is not None

    def watch(self, on_broken: Callable[[str], None]) -> None:
        """Nothing of a simulation can break by itself."""

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
            generated_token_total=self._generated_token_total,
            step_seconds_last=self._step_seconds_last,
            step_token_count_last=self._step_token_count_last,
        )

    def _start_moment(self) -> float:
        """When this step began: when the one before was over, unless there was none or that is long ago."""
        now = self._clock()
        return now if self._ready_at is None else max(self._ready_at, now - MAX_CATCH_UP_SECONDS)

    def _wait_until(self, moment: float, prompts: list[str], is_unwanted: Callable[[str], bool]) -> bool:
        """Waits; False where the step was given up before, because a prompt of it is not wanted any more."""
        while (left := moment - self._clock()) > 0:
            if any(map(is_unwanted, prompts)):
                return False
            self._sleep(min(left, GIVE_UP_SECONDS) if prompts else left)
        return True

    def _advance(self, sequence: Sequence) -> SequenceOutput:
        """Append a sequence's new token, and end the sequence where it ends."""
        assert isinstance(sequence, SimulatedSequence)
        token = answer_token(sequence.seed, sequence.output_token_count, self.answer_table)
        natural = sequence.natural_token_count
        stopped = token in sequence.stop_token_ids or (natural is not None and sequence.output_token_count >= natural)
        if not stopped:
            sequence.token_ids.append(token)
            self._generated_token_total += 1
        finish_reason = "stop" if stopped else "length" if self._is_full(sequence) else ""
        if finish_reason:
            self._batcher.remove(sequence.request_id)
        top_count = sequence.request.sampling.logprobs
        wants = top_count is not None
        return SequenceOutput(
            request_id=sequence.request_id,
            token_ids=[] if stopped else [token],
            logprobs=None if not wants else [] if stopped else [0.0],
            top_token_ids=None if not wants else [] if stopped else [self._likeliest(token, top_count or 0)],
            top_logprobs=None if not wants else [] if stopped else [[0.0, *[UNLIKELY_LOGPROB] * 20][: top_count or 0]],
            finish_reason=finish_reason,
            prompt_token_count=sequence.prompt_token_count,
            output_token_count=sequence.output_token_count,
        )

    def _likeliest(self, token: int, count: int) -> list[int]:
        others = [other for other in self.answer_table[: count + 1] if other != token]
        return [token, *others][:count]

    def _is_full(self, sequence: Sequence) -> bool:
        return (
            sequence.output_token_count >= sequence.request.max_tokens
            or sequence.token_count >= self.model_info.context_token_count
        )

    def _natural_token_count(self, seed: int) -> int | None:
        if not self.config.answer_tokens_median:
            return None
        return natural_token_count(seed, median=self.config.answer_tokens_median, sigma=self.config.answer_tokens_sigma)

    def _count(self, plan: StepPlan, seconds: float) -> None:
        self._step_count += 1
        self._step_seconds_last = seconds
        self._step_token_count_last = plan.token_count
        for work in plan.work:
            self._prompt_token_total += max(0, min(work.count, work.sequence.prompt_token_count - work.start))


def _model_info(config: SimulationConfig, architecture: Architecture) -> ModelInfo:
    asked, bound = config.max_context_tokens, architecture.context_token_count
    if asked is not None and asked > bound:
        raise ModelLoadError(f"max_context_tokens is {asked}, the model's own bound is {bound}")
    return ModelInfo(
        name=f"{architecture.name} simulated as {config.sim_preset}",
        architecture="simulated",
        vocabulary_size=architecture.vocabulary_size,
        context_token_count=min(asked or bound, config.kv_block_count * config.block_token_count),
        eos_token_ids=architecture.eos_token_ids,
        bos_token_id=architecture.bos_token_id,
        layer_count=architecture.layer_count,
        hidden_size=architecture.hidden_size,
        head_count=architecture.head_count,
        kv_head_count=architecture.kv_head_count,
        parameter_count=0,
        weight_dtype="none",
        compute_dtype="none",
        cache_dtype="none",
        device="none",
    )
