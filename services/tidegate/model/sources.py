"""Where an answer's tokens come from: the own Triton, and when it breaks, another replica or its return.

1. Take a slot and ask the own Triton.
2. When its stream breaks: ask the other replicas, which go on after the tokens given so far.
3. When none does: wait for the own Triton to come back, and go on there.
4. After `resume_wait_seconds` without one new token, give up with REPLICA_UNAVAILABLE.

A request that another replica handed over does only step 1: who handed it over looks further.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from tidegate.common.arena import HandleError
from tidegate.common.errors import Reason, TidegateError
from tidegate.model.call import Job
from tidegate.model.credits import Urgency
from tidegate.model.peers import Peers
from tidegate.model.prompts import HeldPrompt, PromptSource
from tidegate.model.slots import Slots
from tidegate.model.tokens import Chunk
from tidegate.model.triton_client import (
    ArenaSlice,
    EngineOutput,
    EngineRefused,
    EngineRequest,
    TritonClient,
    TritonGone,
)
from tidegate.text.model_files import TextModel
from tidegate.v1 import inference_pb2

log = structlog.get_logger()

_WORTH_ANOTHER_TRY = frozenset({Reason.REPLICA_UNAVAILABLE, Reason.SERVER_IS_OVERLOADED, Reason.INTERNAL_ERROR})
"""What another replica may say and this one may look further for."""


_ENGINE_REASONS = {
    "QUEUE_FULL": Reason.SERVER_IS_OVERLOADED,
    "NON_FINITE_LOGITS": Reason.NUMERICAL_ERROR,
    "SCHEMA_TOO_COMPLEX": Reason.INVALID_VALUE,
}
"""The engine's own words for what the table names otherwise."""


class ResumeTerms(msgspec.Struct, frozen=True, kw_only=True):
    """How long a broken stream looks for a place to go on."""

    wait_seconds: float
    backoff_seconds: float


class TokenSource:
    """Gives the tokens of answers."""

    def __init__(
        self,
        triton: TritonClient,
        slots: Slots,
        peers: Peers,
        prompts: PromptSource,
        model: TextModel,
        terms: ResumeTerms,
        *,
        engine_id_prefix: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._triton = triton
        self._slots = slots
        self._peers = peers
        self._prompts = prompts
        self._model = model
        self._terms = terms
        self._clock = clock
        self._engine_id_prefix = engine_id_prefix
        self._engine_id_count = 0

    async def chunks(self, job: Job, answer_token_ids: list[int]) -> AsyncGenerator[Chunk, None]:
        """The tokens that follow `answer_token_ids`, to which the reader appends each chunk's tokens as it comes.

        Raises:
            TidegateError: refused, or it could not be finished.
        """
        try:
            async with aclosing(self._from_triton(job, answer_token_ids, job.call.credit)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        except TritonGone as error:
            log.warning("engine_stream_broke", request_id=job.record.request_id, error=str(error))
            if job.call.resumed:
                raise TidegateError(Reason.REPLICA_UNAVAILABLE, "The replica's engine went away.") from error
        async with aclosing(self._from_elsewhere(job, answer_token_ids)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _from_elsewhere(self, job: Job, answer_token_ids: list[int]) -> AsyncGenerator[Chunk, None]:
        prompt_token_ids = (await self._prompt_token_ids(job)).tolist()
        give_up_at = self._clock() + self._terms.wait_seconds
        while self._clock() < give_up_at:
            count_before = len(answer_token_ids)
            with suppress(TritonGone):
                async with aclosing(self._one_round(job, prompt_token_ids, answer_token_ids)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                        if chunk.finish_reason:
                            return
            if len(answer_token_ids) > count_before:
                give_up_at = self._clock() + self._terms.wait_seconds
            await asyncio.sleep(self._terms.backoff_seconds)
        raise TidegateError(
            Reason.REPLICA_UNAVAILABLE,
            f"The replica's engine went away, and for {self._terms.wait_seconds:g} s no other could go on.",
            retry_after_seconds=1.0,
        )

    async def _one_round(
        self, job: Job, prompt_token_ids: Sequence[int], answer_token_ids: list[int]
    ) -> AsyncGenerator[Chunk, None]:
        """Tries the others, then the own Triton if it is back; ends without a finish when neither can."""
        addresses = self._peers.addresses()
        attempts: list[AsyncGenerator[Chunk, None]] = []
        if addresses:
            seconds = max(0.001, job.record.deadline - self._clock())
            attempts.append(self._peers.continue_at(addresses, job, prompt_token_ids, answer_token_ids, seconds))
        if self._triton.ready:
            attempts.append(self._from_triton(job, answer_token_ids, "", resumed=True))
        for attempt in attempts:
            count_before = len(answer_token_ids)
            try:
                async with aclosing(attempt) as chunks:
                    async for chunk in chunks:
                        if len(answer_token_ids) == count_before:
                            job.record.resumed_count += 1
                        yield chunk
                        if chunk.finish_reason:
                            return
            except TidegateError as error:
                if error.reason not in _WORTH_ANOTHER_TRY:
                    raise
                log.warning(
                    "answer_did_not_go_on", request_id=job.record.request_id, reason=error.reason.name, error=str(error)
                )
            if len(answer_token_ids) > count_before:
                return

    async def _prompt_token_ids(self, job: Job) -> NDArray[np.int32]:
        """The prompt's tokens, [prompt_token_count] int32, made again from the request where their lease was lost."""
        try:
            return self._prompts.tokens(job.prompt)
        except HandleError as error:
            log.warning("prompt_prepared_again", request_id=job.record.request_id, error=str(error))
            return await self._prompts.prepare_again(job.prompt, job.request, job.call.tenant)

    async def _from_triton(
        self, job: Job, answer_token_ids: list[int], credit_id: str, *, resumed: bool = False
    ) -> AsyncGenerator[Chunk, None]:
        if not self._triton.ready:
            # Before anything was promised another replica is the better place, and Envoy knows the way.
            raise TidegateError(
                Reason.REPLICA_UNAVAILABLE, "The replica's engine is not ready.", retry_after_seconds=1.0
            )
        seconds_left = job.record.deadline - self._clock()
        if seconds_left <= 0.0:
            raise TidegateError(Reason.DEADLINE_EXCEEDED, "The request came to the replica after its deadline.")
        slot = await self._slots.take(
            credit_id=credit_id,
            resumed=resumed or job.call.resumed,
            urgency=Urgency(job.priority),
            seconds_left=seconds_left,
        )
        job.record.slot_at = self._clock()
        job.spent = job.spent or slot.spent
        try:
            outputs = self._triton.generate(await self._engine_request(job, answer_token_ids))
            async with aclosing(outputs):
                async for output in outputs:
                    slot.start()
                    if output.finish_reason:
                        # The engine's slot is free now, however slowly the client reads what is left.
                        slot.release()
                    yield self._chunk(output, job)
                    if output.finish_reason:
                        return
        except EngineRefused as error:
            raise _refusal(error.reason, error.message) from error
        finally:
            slot.release()

    async def _engine_request(self, job: Job, answer_token_ids: list[int]) -> EngineRequest:
        request = job.request
        self._engine_id_count += 1
        return EngineRequest(
            request_id=f"{self._engine_id_prefix}-{self._engine_id_count}",
            tokens=await self._engine_tokens(job, answer_token_ids),
            prior_output_count=len(answer_token_ids),
            max_tokens=job.max_tokens,
            sampling=request.sampling,
            logprobs=request.logprobs if request.HasField("logprobs") else None,
            stop_token_ids=self._model.eos_token_ids,
            ignore_eos=request.ignore_eos,
            priority=job.priority,
            cache_salt=job.call.tenant,
        )

    async def _engine_tokens(self, job: Job, answer_token_ids: list[int]) -> ArenaSlice | NDArray[np.int32]:
        handle = job.prompt.handle
        if handle is not None and not answer_token_ids and self._may_map(job.prompt):
            return ArenaSlice(region=handle.region, byte_offset=handle.byte_offset, byte_count=handle.byte_count)
        prompt_token_ids = await self._prompt_token_ids(job)
        return np.concatenate([prompt_token_ids, np.asarray(answer_token_ids, dtype=np.int32)])

    def _may_map(self, prompt: HeldPrompt) -> bool:
        """Whether Triton has mapped the very memory that the prompt lies in, and the prompt still lies there."""
        assert prompt.handle is not None
        return (
            self._prompts.is_live(prompt)
            and self._prompts.is_registered_memory()
            and self._triton.arena_is_registered(prompt.handle.region)
        )

    def _chunk(self, output: EngineOutput, job: Job) -> Chunk:
        if output.finish_reason in ("error", "cancelled"):
            raise _failure(output)
        token_ids = output.token_ids
        # The engine keeps the token that ended the answer to itself; it was generated, so it is counted.
        ended_by_token = output.finish_reason == "stop" and not (
            len(token_ids) and token_ids[-1] in self._model.eos_token_ids
        )
        return Chunk(
            token_ids=token_ids,
            logprobs=self._logprobs(output) if job.request.HasField("logprobs") else (),
            finish_reason=output.finish_reason,
            unseen_token_count=int(ended_by_token),
            cached_token_count=output.cached_token_count,
        )

    def _logprobs(self, output: EngineOutput) -> list[inference_pb2.TokenLogprob]:
        label = self._model.tokenizer.token_label
        entries = []
        for place, token_id in enumerate(output.token_ids):
            logprob = output.logprobs[place] if output.logprobs else 0.0
            entry = inference_pb2.TokenLogprob(token_id=token_id, text=label(token_id), logprob=min(0.0, logprob))
            if output.top_token_ids and output.top_logprobs:
                for other_id, logprob in zip(output.top_token_ids[place], output.top_logprobs[place], strict=True):
                    entry.alternatives.add(token_id=other_id, text=label(other_id), logprob=min(0.0, logprob))
            entries.append(entry)
        return entries


def _refusal(word: str, message: str) -> TidegateError:
    # What can be followed of a schema or a grammar only the engine knows; all else was checked before.
    field = next((f"sampling.{name}" for name in ("json_schema", "grammar") if message.startswith(name)), "")
    return TidegateError(_reason(word), message, field=field, retry_after_seconds=1.0)


def _failure(output: EngineOutput) -> TidegateError:
    word, _, message = output.error.partition(" ")
    return _refusal(word.rstrip(":"), message or output.error or "The engine ended the answer.")


def _reason(word: str) -> Reason:
    return _ENGINE_REASONS.get(word) or Reason.__members__.get(word, Reason.INTERNAL_ERROR)
