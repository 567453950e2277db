"""The life of one request in the model service: the table of contents.

1. Check it, and find its prompt.
2. Make it concrete, so that it can go on elsewhere.
3. Generate, and give each event to the caller.
4. Whatever happened: release the prompt, say how it went, record a complete answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import msgspec

from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError
from tidegate.model.call import CallHeaders, Job, Record, class_of, make_concrete
from tidegate.model.generation import ChunkSource, Generation
from tidegate.model.prompts import PromptSource
from tidegate.model.records import AnswerCollector, AnswerRecorder
from tidegate.model.reports import Reports, outcome_of_finish, outcome_of_refusal
from tidegate.openai.request import OpenAIRequest
from tidegate.text.model_files import TextModel
from tidegate.text.request_rules import validate_generate
from tidegate.v1 import inference_pb2, replica_pb2

RETRY_SECONDS: Final = 1.0
"""A replica or a scheduler that died is back after about so long, or after much longer."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request as it came in, on whichever surface."""

    request: inference_pb2.GenerateRequest
    """The service's own copy: it is made concrete in place."""
    call: CallHeaders
    record: Record
    openai_names: bool
    """Whether errors name fields as OpenAI does."""


class Answers:
    """Answers requests."""

    def __init__(
        self,
        model: TextModel,
        prompts: PromptSource,
        source: ChunkSource,
        reports: Reports,
        recorder: AnswerRecorder,
        *,
        lite_model_name: str = "",
        buffer_token_limit: int,
        batch_delta_seconds: float,
        dice: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._source = source
        self._reports = reports
        self._recorder = recorder
        self._lite_model_name = lite_model_name
        self._buffer_token_limit = buffer_token_limit
        self._batch_delta_seconds = batch_delta_seconds
        self._dice = dice
        self._clock = clock

    def parsed(self, record: Record, parse: Callable[[bytes], OpenAIRequest], body: bytes) -> OpenAIRequest:
        """The body as a request; one that is refused is reported like any other.

        Raises:
            TidegateError: what is wrong with it.
        """
        try:
            return parse(body)
        except TidegateError as error:
            record.reason, record.outcome = error.reason.name, outcome_of_refusal(error)
            self._end(record, None)
            raise

    async def events(self, ask: Ask) -> AsyncGenerator[inference_pb2.GenerateEvent, None]:
        """The events of the answer.

        Raises:
            TidegateError: refused, or failed before the first token.
        """
        record, job = ask.record, None
        try:
            job = await self._accept(ask)
            generation = Generation(
                job,
                self._source,
                self._model.tokenizer,
                self._reports,
                buffer_token_limit=self._buffer_token_limit,
                delta_seconds=self._batch_delta_seconds if job.service_class == "batch" else 0.0,
                clock=self._clock,
            )
            collector = self._collector(ask)
            async with aclosing(generation.events()) as events:
                async for event in events:
                    recordable = None if collector is None else collector.add(event)
                    yield event
                    if recordable is not None:
                        self._recorder.put(recordable)
            record.outcome = outcome_of_finish(record)
        except TidegateError as error:
            record.reason, record.outcome = error.reason.name, outcome_of_refusal(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._note_departure(record)
            raise
        except Exception:
            record.reason, record.outcome = Reason.INTERNAL_ERROR.name, replica_pb2.REQUEST_OUTCOME_FAILED
            raise
        finally:
            self._end(record, job)

    async def _accept(self, ask: Ask) -> Job:
        request, record = ask.request, ask.record
        validate_generate(request)
        self._check_model(request, ask.call)
        record.service_class = class_of(request, ask.call)
        record.client_request_id = request.request_id
        prompt = await self._prompts.hold(
            request, tensor_header=ask.call.tensor, tenant=ask.call.tenant, openai_names=ask.openai_names
        )
        if ask.call.max_tokens is not None and not request.resume.token_ids:
            prompt.max_tokens = max(1, min(prompt.max_tokens, ask.call.max_tokens))
        make_concrete(request, prompt, self._model.name, self._dice)
        record.prepared_at = self._clock()
        record.prompt_token_count = prompt.prompt_token_count
        record.prior_token_count = len(request.resume.token_ids)
        record.max_tokens = prompt.max_tokens
        return Job(
            request=request,
            request_id=request.request_id or record.request_id,
            call=ask.call,
            service_class=record.service_class,
            prompt=prompt,
            record=record,
        )

    def _check_model(self, request: inference_pb2.GenerateRequest, call: CallHeaders) -> None:
        """Lets the lite model answer for another, where the scheduler says so, and no other answer for it."""
        if self._model.name == self._lite_model_name:
            if call.lite and call.lite != headers.LITE_BY_NAME:
                request.model = ""
        elif request.model and request.model == self._lite_model_name:
            message = f"No replica of '{request.model}' can be reached."
            raise TidegateError(Reason.REPLICA_UNAVAILABLE, message, field="model", retry_after_seconds=RETRY_SECONDS)

    def _collector(self, ask: Ask) -> AnswerCollector | None:
        # An answer that a brownout may have cut short is not the whole one that its key stands for.
        if not ask.call.answer_key or ask.request.resume.token_ids or ask.call.max_tokens is not None:
            return None
        return AnswerCollector(ask.call.answer_key, ask.call.tenant)

    def _note_departure(self, record: Record) -> None:
        """The call was cancelled: by the client, or by gRPC because its deadline passed."""
        late = self._clock() >= record.deadline
        reason = Reason.DEADLINE_EXCEEDED if late else Reason.CANCELLED
        record.reason = reason.name
        record.outcome = outcome_of_refusal(TidegateError(reason, ""))

    def _end(self, record: Record, job: Job | None) -> None:
        record.ended_at = self._clock()
        if job is not None:
            self._prompts.release(job.prompt)
        self._reports.end(record, None if job is None else job.spent)
