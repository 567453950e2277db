"""What a GenerateRequest may say, whoever wrote it: the bounds of inference.proto, checked in one place.

The first fault found is the one that is told, with the field's path as the proto has it.
"""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

from tidegate.common.errors import Reason, TidegateError
from tidegate.v1 import inference_pb2

ROLES: Final = ("system", "developer", "user", "assistant")
MESSAGE_COUNT_LIMIT: Final = 4096
NAME_CHARACTER_LIMIT: Final = 64
STOP_COUNT_LIMIT: Final = 16
STOP_CHARACTER_LIMIT: Final = 1024
"""What may be the beginning of a stop text is held back from the client, so there is an end to its length."""
USER_CHARACTER_LIMIT: Final = 512
REQUEST_ID_CHARACTER_LIMIT: Final = 128
MODEL_CHARACTER_LIMIT: Final = 256
LOGPROBS_LIMIT: Final = 20
JSON_SCHEMA_BYTE_LIMIT: Final = 16_384
GRAMMAR_BYTE_LIMIT: Final = 16_384
LOGIT_BIAS_COUNT_LIMIT: Final = 1024
LOGIT_BIAS_LIMIT: Final = 100
MAX_TOKENS_LIMIT: Final = 2**31 - 1
TOKEN_ID_LIMIT: Final = 2**31 - 1


def validate_generate(request: inference_pb2.GenerateRequest) -> None:
    """Checks everything that can be checked without the model.

    Raises:
        TidegateError: the first fault, with the field as inference.proto names it (`sampling.top_p`, `stop[2]`).
    """
    _check_names(request)
    _check_prompt(request)
    _check_sampling(request.sampling)
    _check_json_schema(request)
    _check_grammar(request)
    if request.HasField("max_tokens") and request.max_tokens < 1:
        _refuse("max_tokens", f"must be at least 1, is {request.max_tokens}")
    if request.HasField("logprobs") and not 0 <= request.logprobs <= LOGPROBS_LIMIT:
        _refuse("logprobs", f"must be in [0, {LOGPROBS_LIMIT}], is {request.logprobs}")
    _check_stop(request.stop)
    if request.service_class not in inference_pb2.ServiceClass.values():
        _refuse("service_class", f"{request.service_class} is not a class")
    if request.truncation not in inference_pb2.TruncationPolicy.values():
        _refuse("truncation", f"{request.truncation} is not a policy")
    _check_token_ids(request.resume.token_ids, "resume.token_ids")


def _check_names(request: inference_pb2.GenerateRequest) -> None:
    request_id = request.request_id
    if len(request_id) > REQUEST_ID_CHARACTER_LIMIT or not (request_id.isascii() and request_id.isprintable()):
        _refuse("request_id", f"must be at most {REQUEST_ID_CHARACTER_LIMIT} printable ASCII characters")
    if len(request.model) > MODEL_CHARACTER_LIMIT:
        _refuse("model", f"must be at most {MODEL_CHARACTER_LIMIT} characters, has {len(request.model)}")
    if len(request.user) > USER_CHARACTER_LIMIT:
        _refuse("user", f"must be at most {USER_CHARACTER_LIMIT} characters, has {len(request.user)}")


def _check_prompt(request: inference_pb2.GenerateRequest) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        fault = "Missing required parameter: one of chat, text and tokens."
        raise TidegateError(Reason.MISSING_REQUIRED_PARAMETER, fault, field="prompt")
    if kind == "chat":
        _check_messages(request.chat.messages)
    elif kind == "text":
        if not request.text:
            _refuse("text", "must not be empty")
    elif not request.tokens.token_ids:
        _refuse("tokens.token_ids", "must not be empty")
    else:
        _check_token_ids(request.tokens.token_ids, "tokens.token_ids")


def _check_messages(messages: Any) -> None:
    if not 1 <= len(messages) <= MESSAGE_COUNT_LIMIT:
        _refuse("chat.messages", f"must have 1 to {MESSAGE_COUNT_LIMIT} messages, has {len(messages)}")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            _refuse(f"chat.messages[{place}].role", f"must be one of {', '.join(ROLES)}, is {message.role[:64]!r}")
        if not message.content and message.role != "assistant":
            _refuse(f"chat.messages[{place}].content", f"must not be empty for the role {message.role}")
        if len(message.name) > NAME_CHARACTER_LIMIT:
            _refuse(f"chat.messages[{place}].name", f"must be at most {NAME_CHARACTER_LIMIT} characters")


def _check_sampling(sampling: inference_pb2.SamplingParameters) -> None:
    _check_range(sampling, "temperature", 0, 2)
    _check_range(sampling, "frequency_penalty", -2, 2)
    _check_range(sampling, "presence_penalty", -2, 2)
    _check_range(sampling, "top_p", 0, 1, open_below=True)
    _check_range(sampling, "min_p", 0, 1)
    _check_range(sampling, "repetition_penalty", 0, 2, open_below=True)
    if sampling.top_k < 0:
        _refuse("sampling.top_k", f"must be at least 0, is {sampling.top_k}")
    if len(sampling.logit_bias) > LOGIT_BIAS_COUNT_LIMIT:
        count = len(sampling.logit_bias)
        _refuse("sampling.logit_bias", f"must have at most {LOGIT_BIAS_COUNT_LIMIT} tokens, has {count}")
    for token_id, bias in sampling.logit_bias.items():
        if token_id < 0:
            _refuse(f"sampling.logit_bias.{token_id}", "must be of a token id, at least 0")
        if not abs(bias) <= LOGIT_BIAS_LIMIT:
            bound = f"[-{LOGIT_BIAS_LIMIT}, {LOGIT_BIAS_LIMIT}]"
            _refuse(f"sampling.logit_bias.{token_id}", f"must be in {bound}, is {bias:g}")


def _check_json_schema(request: inference_pb2.GenerateRequest) -> None:
    """Its length, and that it is an object; what of it can be followed, the engine says."""
    schema = request.sampling.json_schema
    if not schema:
        return
    if len(schema.encode()) > JSON_SCHEMA_BYTE_LIMIT:
        fault = f"must have at most {JSON_SCHEMA_BYTE_LIMIT} bytes, has {len(schema.encode())}"
        _refuse("sampling.json_schema", fault)
    try:
        is_object = isinstance(json.loads(schema), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        _refuse("sampling.json_schema", "must be a JSON object")
    if request.ignore_eos:
        _refuse("ignore_eos", "must be false where the answer is JSON, which ends by itself")


def _check_grammar(request: inference_pb2.GenerateRequest) -> None:
    """Its length and its kind; whether it can be followed, the engine says."""
    sampling = request.sampling
    if not sampling.grammar:
        if sampling.grammar_kind:
            _refuse("sampling.grammar_kind", "needs a grammar")
        return
    if sampling.json_schema:
        _refuse("sampling.grammar", "cannot be combined with a json_schema")
    if sampling.grammar_kind not in (inference_pb2.GRAMMAR_KIND_LARK, inference_pb2.GRAMMAR_KIND_REGEX):
        _refuse("sampling.grammar_kind", f"must be LARK or REGEX beside a grammar, is {sampling.grammar_kind}")
    if len(sampling.grammar.encode()) > GRAMMAR_BYTE_LIMIT:
        fault = f"must have at most {GRAMMAR_BYTE_LIMIT} bytes, has {len(sampling.grammar.encode())}"
        _refuse("sampling.grammar", fault)
    if request.ignore_eos:
        _refuse("ignore_eos", "must be false where the answer follows a grammar, which ends by itself")


def _check_range(
    sampling: inference_pb2.SamplingParameters, name: str, low: float, high: float, *, open_below: bool = False
) -> None:
    if not sampling.HasField(name):  # type: ignore[arg-type]  # The name is one of the message's own.
        return
    value = getattr(sampling, name)
    # Written so that NaN, which compares as false, is refused.
    if not (low <= value <= high) or (open_below and value == low):
        _refuse(f"sampling.{name}", f"must be in {'(' if open_below else '['}{low}, {high}], is {value:g}")


def _check_stop(stop: Any) -> None:
    if len(stop) > STOP_COUNT_LIMIT:
        _refuse("stop", f"must have at most {STOP_COUNT_LIMIT} texts, has {len(stop)}")
    for place, text in enumerate(stop):
        if not 1 <= len(text) <= STOP_CHARACTER_LIMIT:
            _refuse(f"stop[{place}]", f"must have 1 to {STOP_CHARACTER_LIMIT} characters, has {len(text)}")


def _check_token_ids(token_ids: Any, field: str) -> None:
    if token_ids and min(token_ids) < 0:
        place = next(place for place, token_id in enumerate(token_ids) if token_id < 0)
        _refuse(f"{field}[{place}]", f"must be a token id, at least 0, is {token_ids[place]}")


def _refuse(field: str, fault: str) -> NoReturn:
    raise TidegateError(Reason.INVALID_VALUE, f"Invalid value for '{field}': {fault}.", field=field)
