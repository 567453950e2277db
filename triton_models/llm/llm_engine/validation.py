"""What a request must satisfy before the engine takes it.

Pure. Invariant: a request that passes can be computed; one that does not is refused with a reason and
a message that names the field, its value and the bound.
"""

import math
from collections.abc import Iterator

import numpy as np

from .errors import CONTEXT_LENGTH_EXCEEDED, INVALID_VALUE, RequestRefused
from .request import GRAMMAR_KINDS, ModelInfo, SamplingParams, SequenceRequest

TOP_LOGPROBS_BOUND = 20
TEMPERATURE_BOUND = 100.0
LOGIT_BIAS_BOUND = 1024
_SEEDS = range(-(1 << 63), 1 << 64)


def validated_token_ids(request: SequenceRequest, model: ModelInfo) -> list[int]:
    """The request's tokens as a list of its own; RequestRefused where anything is wrong."""
    token_ids = _token_ids(request, model)
    for problem in _problems(request, token_ids, model):
        raise RequestRefused(INVALID_VALUE, problem)
    if len(token_ids) >= model.context_token_count:
        raise RequestRefused(
            CONTEXT_LENGTH_EXCEEDED,
            f"token_ids has {len(token_ids)} tokens, and the context of {model.context_token_count}"
            " must hold at least one more",
        )
    return token_ids


def _token_ids(request: SequenceRequest, model: ModelInfo) -> list[int]:
    try:
        array = np.asarray(request.token_ids)
    except (ValueError, OverflowError) as error:
        raise RequestRefused(INVALID_VALUE, f"token_ids is not a list of integers: {error}") from error
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise RequestRefused(
            INVALID_VALUE, f"token_ids has shape {list(array.shape)} and type {array.dtype},"
            " expected a list of at least one integer",
        )  # fmt: skip
    outside = (array < 0) | (array >= model.vocabulary_size)
    if outside.any():
        place = int(outside.argmax())
        raise RequestRefused(
            INVALID_VALUE,
            f"token_ids[{place}] is {array[place]}, expected 0 to {model.vocabulary_size - 1}",
        )
    return array.tolist()


def _problems(request: SequenceRequest, token_ids: list[int], model: ModelInfo) -> Iterator[str]:
    if not isinstance(request.request_id, str) or not request.request_id:
        yield f"request_id is {request.request_id!r}, expected a text"
    yield from _integer("priority", request.priority, -(1 << 31), (1 << 31) - 1)
    yield from _integer("prior_output_count", request.prior_output_count, 0, len(token_ids) - 1)
    yield from _integer("max_tokens", request.max_tokens, 1, (1 << 31) - 1)
    if not request.prior_output_count < request.max_tokens:
        yield (
            f"max_tokens is {request.max_tokens}, expected more than prior_output_count"
            f" ({request.prior_output_count}): nothing is left to make"
        )
    for token in request.stop_token_ids:
        yield from _integer("stop_token_ids", token, 0, model.vocabulary_size - 1)
    yield from _sampling_problems(request.sampling, model)
    yield from _grammar_problems(request)


def _grammar_problems(request: SequenceRequest) -> Iterator[str]:
    sampling = request.sampling
    if sampling.json_schema and sampling.grammar:
        yield "grammar and json_schema are both given, expected one"
    if sampling.grammar and sampling.grammar_kind not in GRAMMAR_KINDS:
        yield f"grammar_kind is {sampling.grammar_kind!r}, expected one of {', '.join(GRAMMAR_KINDS)}"
    if sampling.grammar_kind and not sampling.grammar:
        yield f"grammar_kind is {sampling.grammar_kind!r}, but grammar is empty"
    if request.ignore_eos and sampling.json_schema:
        yield "ignore_eos is True, but JSON of a json_schema ends by itself"
    if request.ignore_eos and sampling.grammar:
        yield "ignore_eos is True, but the output of a grammar ends by itself"


def _sampling_problems(sampling: SamplingParams, model: ModelInfo) -> Iterator[str]:
    yield from _number("temperature", sampling.temperature, 0.0, TEMPERATURE_BOUND)
    yield from _integer("top_k", sampling.top_k, 0, (1 << 31) - 1)
    yield from _number("top_p", sampling.top_p, 0.0, 1.0)
    if sampling.top_p == 0.0:
        yield "top_p is 0, expected more than 0"
    yield from _number("min_p", sampling.min_p, 0.0, 1.0)
    if sampling.seed is not None:
        yield from _integer("seed", sampling.seed, _SEEDS.start, _SEEDS.stop - 1)
    yield from _number("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)
    yield from _number("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    yield from _number("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    if len(sampling.logit_bias) > LOGIT_BIAS_BOUND:
        yield f"logit_bias has {len(sampling.logit_bias)} tokens, expected at most {LOGIT_BIAS_BOUND}"
    for token, bias in sampling.logit_bias.items():
        yield from _integer("a token of logit_bias", token, 0, model.vocabulary_size - 1)
        yield from _number(f"logit_bias of token {token}", bias, -100.0, 100.0)
    if sampling.logprobs is not None:
        yield from _integer("logprobs", sampling.logprobs, 0, min(TOP_LOGPROBS_BOUND, model.vocabulary_size))


def _integer(name: str, value: object, least: int, most: int) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        yield f"{name} is {value!r}, expected an integer from {least} to {most}"


def _number(name: str, value: object, least: float, most: float) -> Iterator[str]:
    is_number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        yield f"{name} is {value!r}, expected a number from {least} to {most}"
