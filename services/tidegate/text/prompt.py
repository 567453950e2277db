"""The one path from a request to the tokens that a model reads, with everything the mesh decides by.

Preprocess runs it for every request; the model service runs it when preprocess could not. The same request gives
the same prompt in both.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from tidegate.common.errors import Reason, TidegateError
from tidegate.text.blocks import answer_key, block_hashes
from tidegate.text.model_files import TextModel
from tidegate.text.request_rules import validate_generate
from tidegate.v1 import inference_pb2

UNSTATED_ANSWER_SHARE: Final = 4
"""A truncated prompt leaves a quarter of the context to an answer whose length the request does not say."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, ready for the engine."""

    model: str
    """The model's id, the default filled in."""
    token_ids: NDArray[np.int32]
    """[prompt_token_count] int32; without the tokens of `request.resume`."""
    prompt_token_count: int
    truncated_token_count: int
    """Tokens that the request's own truncation policy left out."""
    max_tokens: int
    """The most tokens the answer may have, resumed ones included, within the context; at least 1."""
    answer_key: bytes
    """32 bytes, or empty when the answer is not deterministic or goes on from an earlier one."""
    block_hashes: tuple[int, ...]
    """One 64-bit hash a whole block of 16 tokens."""
    service_class: inference_pb2.ServiceClass.ValueType
    """Never UNSPECIFIED."""


def prepare_prompt(
    request: inference_pb2.GenerateRequest, model: TextModel, tenant: str, *, openai_names: bool = False
) -> Prompt:
    """Turns a request into a prompt.

    Args:
        request: as a client sent it; checked here.
        model: the model that will answer.
        tenant: whose request it is; part of the hashes and the key.
        openai_names: errors name the fields as the OpenAI surface does (`messages`) instead of as the proto does.

    Raises:
        TidegateError: CONTEXT_LENGTH_EXCEEDED with both lengths, MODEL_NOT_FOUND, or a field out of its bounds.
    """
    try:
        return _prepare(request, model, tenant)
    except TidegateError as error:
        if not openai_names:
            raise
        _raise_in_openai_names(error)


@asynccontextmanager
async def in_openai_names(grammar_field: str = "") -> AsyncIterator[None]:
    """Errors within name fields as the OpenAI surface does.

    Args:
        grammar_field: the field in which the client asked for a schema or a grammar, which has several names there.
    """
    try:
        yield
    except TidegateError as error:
        _raise_in_openai_names(error, grammar_field)


def _raise_in_openai_names(error: TidegateError, grammar_field: str = "") -> NoReturn:
    field = openai_field(error.field, grammar_field)
    if field == error.field:
        raise error
    message = error.message.replace(f"'{error.field}'", f"'{field}'")
    raise TidegateError(error.reason, message, field=field, retry_after_seconds=error.retry_after_seconds) from error


def openai_field(field: str, grammar_field: str = "") -> str:
    """The OpenAI name of a field of GenerateRequest."""
    if field == "text" or field.startswith("tokens.token_ids"):
        return "prompt" + field.removeprefix("text").removeprefix("tokens.token_ids")
    if field == "sampling.json_schema":
        return grammar_field or "response_format"
    if field == "sampling.grammar":
        return grammar_field or "structured_outputs"
    return re.sub(r"^(chat|sampling)\.", "", field)


def _prepare(request: inference_pb2.GenerateRequest, model: TextModel, tenant: str) -> Prompt:
    validate_generate(request)
    if request.model and request.model != model.name:
        fault = f"The model '{request.model}' does not exist; there is '{model.name}'."
        raise TidegateError(Reason.MODEL_NOT_FOUND, fault, field="model")
    if request.sampling.top_k > model.vocabulary_size:
        _refuse("sampling.top_k", f"must be at most the vocabulary's size {model.vocabulary_size}")
    highest = max(request.sampling.logit_bias, default=0)
    if highest >= model.vocabulary_size:
        fault = f"{highest} is not in the vocabulary of {model.vocabulary_size} tokens"
        _refuse(f"sampling.logit_bias.{highest}", fault)
    _check_vocabulary(request.resume.token_ids, model, "resume.token_ids")
    token_ids, truncated_token_count = _fit(request, model)
    if not token_ids:
        _refuse(_prompt_field(request), "has nothing that the model's vocabulary knows")
    array = np.asarray(token_ids, dtype=np.int32)
    max_tokens = model.context_token_count - len(array)
    if request.HasField("max_tokens"):
        max_tokens = min(max_tokens, request.max_tokens)
    if len(request.resume.token_ids) > max_tokens:
        _refuse("resume.token_ids", f"{len(request.resume.token_ids)} tokens are more than max_tokens {max_tokens}")
    return Prompt(
        model=model.name,
        token_ids=array,
        prompt_token_count=len(array),
        truncated_token_count=truncated_token_count,
        max_tokens=max_tokens,
        answer_key=b"" if request.resume.token_ids else _answer_key(request, array, model.name, tenant, max_tokens),
        block_hashes=tuple(block_hashes(array, model=model.name, tenant=tenant)),
        service_class=request.service_class or inference_pb2.SERVICE_CLASS_STANDARD,
    )


def _answer_key(
    request: inference_pb2.GenerateRequest, token_ids: NDArray[np.int32], model: str, tenant: str, max_tokens: int
) -> bytes:
    return answer_key(
        token_ids,
        model=model,
        tenant=tenant,
        sampling=request.sampling,
        max_tokens=max_tokens,
        stop=request.stop,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        ignore_eos=request.ignore_eos,
    )


def _fit(request: inference_pb2.GenerateRequest, model: TextModel) -> tuple[Sequence[int], int]:
    """The prompt's tokens, and how many were left out so that they fit."""
    limit = model.context_token_count - 1
    may_drop = request.truncation == inference_pb2.TRUNCATION_POLICY_DROP_OLDEST
    room = _room(request, model) if may_drop else limit
    if not may_drop:
        _refuse_at_sight(request, model, limit)
    whole = _encode(request, model)
    if len(whole) <= room:
        return whole, 0
    kept: Sequence[int] | None = None
    if may_drop and request.WhichOneof("prompt") == "chat":
        kept = _drop_oldest_messages(request.chat.messages, model, room)
    elif may_drop:
        kept = _drop_oldest_tokens(request, model, whole, room)
    if kept is not None:
        return kept, len(whole) - len(kept)
    if len(whole) > limit:
        _refuse_length(request, len(whole), limit)
    return whole, 0


def _refuse_at_sight(request: inference_pb2.GenerateRequest, model: TextModel, limit: int) -> None:
    """Refuses a text that is too long whatever its tokens are, without encoding megabytes for the exact number."""
    if request.ByteSize() <= limit * model.tokenizer.longest_token_bytes:
        return
    kind = request.WhichOneof("prompt")
    text = model.chat_template.render(request.chat.messages) if kind == "chat" else request.text
    least = model.tokenizer.least_token_count(text)
    if least > limit:
        _refuse_length(request, f"at least {least}", limit)


def _room(request: inference_pb2.GenerateRequest, model: TextModel) -> int:
    """How many tokens a truncated prompt may have: what the answer does not need, half the context at least."""
    context = model.context_token_count
    answer = request.max_tokens if request.HasField("max_tokens") else context // UNSTATED_ANSWER_SHARE
    return context - max(1, min(answer, context // 2))


def _encode(request: inference_pb2.GenerateRequest, model: TextModel) -> Sequence[int]:
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        _check_vocabulary(request.tokens.token_ids, model, "tokens.token_ids")
        return list(request.tokens.token_ids)
    try:
        if kind == "chat":
            return model.chat_template.encode(request.chat.messages, model.tokenizer)
        text_ids = model.tokenizer.encode(request.text, allow_special=False)
    except ValueError as error:
        _refuse(_prompt_field(request), str(error))
    return [*model.tokenizer.prefix_token_ids, *text_ids]


def _drop_oldest_messages(
    messages: Sequence[inference_pb2.ChatMessage], model: TextModel, room: int
) -> Sequence[int] | None:
    """Leaves out the fewest of the oldest messages after the system's; the last message always stays.

    None: even the last message alone does not fit.
    """
    first = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), 0)
    kept: Sequence[int] | None = None
    low, high = 1, len(messages) - 1 - first
    while low <= high:
        middle = (low + high) // 2
        found = _without(messages, first, middle, model)
        if found is None or len(found) > room:
            low = middle + 1
        else:
            kept, high = found, middle - 1
    return kept


def _without(
    messages: Sequence[inference_pb2.ChatMessage], first: int, drop_count: int, model: TextModel
) -> Sequence[int] | None:
    """The chat's tokens without some messages; a template may refuse one that begins with an answer: one more goes."""
    for count in (drop_count, drop_count + 1):
        rest = [*messages[:first], *messages[first + count :]]
        if len(rest) == first:
            return None
        try:
            return model.chat_template.encode(rest, model.tokenizer)
        except TidegateError:
            continue
    return None


def _drop_oldest_tokens(
    request: inference_pb2.GenerateRequest, model: TextModel, whole: Sequence[int], room: int
) -> Sequence[int]:
    prefix = list(model.tokenizer.prefix_token_ids) if request.WhichOneof("prompt") == "text" else []
    return [*prefix, *whole[len(whole) - (room - len(prefix)) :]]


def _check_vocabulary(token_ids: Sequence[int], model: TextModel, field: str) -> None:
    if token_ids and max(token_ids) >= model.vocabulary_size:
        place = next(i for i, token_id in enumerate(token_ids) if token_id >= model.vocabulary_size)
        _refuse(f"{field}[{place}]", f"{token_ids[place]} is not in the vocabulary of {model.vocabulary_size} tokens")


def _prompt_field(request: inference_pb2.GenerateRequest) -> str:
    return {"chat": "chat.messages", "text": "text"}.get(request.WhichOneof("prompt") or "", "tokens.token_ids")


def _refuse_length(request: inference_pb2.GenerateRequest, token_count: int | str, limit: int) -> NoReturn:
    fault = f"The prompt has {token_count} tokens; the model's context of {limit + 1} tokens leaves room for {limit}."
    raise TidegateError(Reason.CONTEXT_LENGTH_EXCEEDED, fault, field=_prompt_field(request))


def _refuse(field: str, fault: str) -> NoReturn:
    raise TidegateError(Reason.INVALID_VALUE, f"Invalid value for '{field}': {fault}.", field=field)
