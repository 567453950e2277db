"""OpenAI's request bodies as GenerateRequests.

Every parameter of the two endpoints is either honoured, harmless (accepted and without effect, as with other
servers), or refused by name; nothing is dropped in silence. Names beyond OpenAI's are vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from tidegate.openai import json_fields, unsupported
from tidegate.openai.json_fields import Fields
from tidegate.openai.output_grammar import read_output_grammar
from tidegate.text import request_rules as rules
from tidegate.text.request_rules import validate_generate
from tidegate.v1 import inference_pb2

__all__ = ["OpenAIRequest", "parse_chat_completions", "parse_completions", "validate_generate"]

HTTP_STOP_COUNT_LIMIT: Final = 4
"""OpenAI's limit; the typed surface takes 16."""

DEFAULT_COMPLETION_TOKEN_COUNT: Final = 16
"""OpenAI's default for completions, where chats go on to the end of the context."""

ANSWER_COUNT_LIMIT: Final = 128
"""OpenAI's limit of n; more is not even a count."""

TOKEN_ID_CHARACTER_LIMIT: Final = 10

METADATA_ENTRY_LIMIT: Final = 16
METADATA_KEY_CHARACTER_LIMIT: Final = 64
METADATA_VALUE_CHARACTER_LIMIT: Final = 512

SMALLEST_POSITIVE: Final = 1e-9
"""Keeps a tiny but valid top_p or repetition_penalty above zero in single precision."""

SERVICE_CLASSES: Final[Mapping[str, inference_pb2.ServiceClass.ValueType]] = {
    "auto": inference_pb2.SERVICE_CLASS_STANDARD,
    "default": inference_pb2.SERVICE_CLASS_STANDARD,
    "standard": inference_pb2.SERVICE_CLASS_STANDARD,
    "priority": inference_pb2.SERVICE_CLASS_REALTIME,
    "flex": inference_pb2.SERVICE_CLASS_BATCH,
}

_HARMLESS_TEXTS: Final = ("prompt_cache_key", "prompt_cache_retention", "safety_identifier")


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """One request of the OpenAI surface."""

    generate: inference_pb2.GenerateRequest
    """What is asked of the model; its request_id is empty."""
    kind: Literal["chat", "completion"]
    stream: bool
    include_usage: bool
    """Whether the stream ends with a chunk that has the usage."""
    model: str
    """The model as the client named it; empty for the default."""
    service_tier: str | None
    """The tier as the client named it."""
    grammar_field: str = ""
    """The field that asks for a schema or a grammar (`structured_outputs.regex`); empty where none does."""


def parse_chat_completions(body: bytes) -> OpenAIRequest:
    """Reads the body of POST /v1/chat/completions.

    Raises:
        TidegateError: the first fault found, with the field's path (`messages[3].content[0].type`).
    """
    fields = Fields(json_fields.read_object(body))
    generate = inference_pb2.GenerateRequest()
    generate.chat.messages.extend(_messages(fields))
    _read_chat_logprobs(fields, generate)
    _read_chat_max_tokens(fields, generate)
    return _finish(fields, generate, "chat")


def parse_completions(body: bytes) -> OpenAIRequest:
    """Reads the body of POST /v1/completions.

    Raises:
        TidegateError: the first fault found, with the field's path (`prompt[7]`).
    """
    fields = Fields(json_fields.read_object(body))
    generate = inference_pb2.GenerateRequest()
    _read_prompt(fields, generate)
    logprobs = fields.integer("logprobs", 0, rules.LOGPROBS_LIMIT)
    if logprobs is not None:
        generate.logprobs = logprobs
    generate.max_tokens = fields.integer("max_tokens", 1, rules.MAX_TOKENS_LIMIT) or DEFAULT_COMPLETION_TOKEN_COUNT
    _require_one(fields, "best_of")
    return _finish(fields, generate, "completion")


def _finish(
    fields: Fields, generate: inference_pb2.GenerateRequest, kind: Literal["chat", "completion"]
) -> OpenAIRequest:
    """Reads what both endpoints have, and refuses what neither has."""
    model = fields.string("model", rules.MODEL_CHARACTER_LIMIT, may_be_empty=False) or ""
    generate.model = model
    generate.user = fields.string("user", rules.USER_CHARACTER_LIMIT) or ""
    generate.stop.extend(_stop(fields))
    generate.ignore_eos = fields.boolean("ignore_eos") or False
    _read_sampling(fields, generate.sampling)
    grammar_field = read_output_grammar(fields, generate.sampling)
    service_tier = _read_service_tier(fields, generate)
    stream = fields.boolean("stream") or False
    include_usage = _include_usage(fields, stream)
    _require_one(fields, "n")
    _read_harmless(fields)
    fields.finish(unsupported.CHAT if kind == "chat" else unsupported.COMPLETION)
    return OpenAIRequest(generate, kind, stream, include_usage, model, service_tier, grammar_field)


def _require_one(fields: Fields, name: str) -> None:
    """A count of answers, of which this mesh gives one."""
    count = fields.integer(name, 1, ANSWER_COUNT_LIMIT)
    if count not in (None, 1):
        json_fields.refuse_unsupported(name, "may be 1 only")


def _messages(fields: Fields) -> list[inference_pb2.ChatMessage]:
    values = fields.array("messages")
    if values is None:
        json_fields.refuse_missing("messages")
    if not 1 <= len(values) <= rules.MESSAGE_COUNT_LIMIT:
        limit = rules.MESSAGE_COUNT_LIMIT
        json_fields.refuse_value("messages", f"must have 1 to {limit} messages, has {len(values)}")
    return [_message(value, f"messages[{place}]") for place, value in enumerate(values)]


def _message(value: Any, path: str) -> inference_pb2.ChatMessage:
    fields = Fields(json_fields.checked_object(value, path), path)
    role = fields.take("role")
    if role is None:
        json_fields.refuse_missing(f"{path}.role")
    role = json_fields.checked_text(role, f"{path}.role")
    if role in ("tool", "function"):
        json_fields.refuse_unsupported(f"{path}.role", f"{role} is not supported")
    if role not in rules.ROLES:
        known = ", ".join(rules.ROLES)
        json_fields.refuse_value(f"{path}.role", f"must be one of {known}, is {json_fields.shown(role)}")
    content = _content(fields, path, role)
    name = fields.string("name", rules.NAME_CHARACTER_LIMIT) or ""
    fields.finish(unsupported.MESSAGE)
    return inference_pb2.ChatMessage(role=role, content=content, name=name)


def _content(fields: Fields, path: str, role: str) -> str:
    value = fields.take("content")
    path = f"{path}.content"
    if value is None:
        if role == "assistant":
            return ""
        json_fields.refuse_missing(path)
    if isinstance(value, list):
        text = "\n".join(_part(part, f"{path}[{place}]") for place, part in enumerate(value))
    elif isinstance(value, str):
        text = json_fields.checked_text(value, path)
    else:
        json_fields.refuse_type(path, "a string or an array of parts", value)
    if not text and role != "assistant":
        json_fields.refuse_value(path, f"must not be empty for the role {role}")
    return text


def _part(value: Any, path: str) -> str:
    """One part of a message's content; several are put together with a line break, as vLLM does it."""
    fields = Fields(json_fields.checked_object(value, path), path)
    kind = fields.take("type")
    if kind is None:
        json_fields.refuse_missing(f"{path}.type")
    kind = json_fields.checked_text(kind, f"{path}.type")
    if kind != "text":
        refused = f"must be 'text', is {json_fields.shown(kind)}"
        json_fields.refuse_value(f"{path}.type", refused)
    text = fields.take("text")
    if text is None:
        json_fields.refuse_missing(f"{path}.text")
    fields.finish()
    return json_fields.checked_text(text, f"{path}.text")


def _read_prompt(fields: Fields, generate: inference_pb2.GenerateRequest) -> None:
    value = fields.take("prompt")
    if value is None:
        json_fields.refuse_missing("prompt")
    if isinstance(value, list):
        path = "prompt"
        if len(value) > 1 and not isinstance(value[0], int):
            json_fields.refuse_unsupported("prompt", "may be one prompt only, send several requests")
        if value and isinstance(value[0], str | list):
            value, path = value[0], "prompt[0]"
        if isinstance(value, list):
            generate.tokens.token_ids.extend(_token_ids(value, path))
            return
        generate.text = json_fields.checked_text(value, path, may_be_empty=False)
    elif isinstance(value, str):
        generate.text = json_fields.checked_text(value, "prompt", may_be_empty=False)
    else:
        json_fields.refuse_type("prompt", "a string or an array", value)


def _token_ids(values: list[Any], path: str) -> list[int]:
    if not values:
        json_fields.refuse_value(path, "must not be empty")
    for place, value in enumerate(values):
        token_id = json_fields.checked_integer(value, f"{path}[{place}]")
        if not 0 <= token_id <= rules.TOKEN_ID_LIMIT:
            json_fields.refuse_value(f"{path}[{place}]", f"must be a token id, is {json_fields.shown(token_id)}")
    return values


def _read_chat_logprobs(fields: Fields, generate: inference_pb2.GenerateRequest) -> None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, rules.LOGPROBS_LIMIT)
    if wanted:
        generate.logprobs = top or 0
    elif top:
        json_fields.refuse_value("top_logprobs", "needs logprobs to be true")


def _read_chat_max_tokens(fields: Fields, generate: inference_pb2.GenerateRequest) -> None:
    older = fields.integer("max_tokens", 1, rules.MAX_TOKENS_LIMIT)
    newer = fields.integer("max_completion_tokens", 1, rules.MAX_TOKENS_LIMIT)
    if older is not None and newer is not None and older != newer:
        json_fields.refuse_value("max_tokens", f"is {older}, but max_completion_tokens is {newer}; give one")
    most = older if newer is None else newer
    if most is not None:
        generate.max_tokens = most


def _read_sampling(fields: Fields, sampling: inference_pb2.SamplingParameters) -> None:
    for name, low, high, open_below in (
        ("temperature", 0, 2, False),
        ("frequency_penalty", -2, 2, False),
        ("presence_penalty", -2, 2, False),
        ("top_p", 0, 1, True),
        ("min_p", 0, 1, False),
        ("repetition_penalty", 0, 2, True),
    ):
        number = fields.number(name, low, high, open_below=open_below)
        if number is not None:
            setattr(sampling, name, max(number, SMALLEST_POSITIVE) if open_below else number)
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    if seed is not None:
        sampling.seed = seed
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    if top_k is not None:
        # vLLM's older word for "no limit" is -1.
        sampling.top_k = max(top_k, 0)
    _read_logit_bias(fields, sampling)


def _read_logit_bias(fields: Fields, sampling: inference_pb2.SamplingParameters) -> None:
    """By token ids, which are JSON's keys and therefore texts."""
    value = fields.take("logit_bias")
    if value is None:
        return
    names = json_fields.checked_object(value, "logit_bias")
    if len(names) > rules.LOGIT_BIAS_COUNT_LIMIT:
        fault = f"must have at most {rules.LOGIT_BIAS_COUNT_LIMIT} tokens, has {len(names)}"
        json_fields.refuse_value("logit_bias", fault)
    entries = Fields(names, "logit_bias")
    for name in names:
        if len(name) > TOKEN_ID_CHARACTER_LIMIT or not name.isascii() or not name.isdigit():
            json_fields.refuse_value(f"logit_bias.{json_fields.shown_name(name)}", "must be of a token id, at least 0")
        token_id = int(name)
        if token_id > rules.TOKEN_ID_LIMIT or token_id in sampling.logit_bias:
            json_fields.refuse_value(f"logit_bias.{name}", "must be of a token id, and that token's only one")
        bias = entries.number(name, -rules.LOGIT_BIAS_LIMIT, rules.LOGIT_BIAS_LIMIT)
        if bias is not None:
            sampling.logit_bias[token_id] = bias


def _stop(fields: Fields) -> list[str]:
    value = fields.take("stop")
    limit = rules.STOP_CHARACTER_LIMIT
    if value is None:
        return []
    if isinstance(value, str):
        return [json_fields.checked_text(value, "stop", character_limit=limit, may_be_empty=False)]
    if not isinstance(value, list):
        json_fields.refuse_type("stop", "a string or an array of strings", value)
    if len(value) > HTTP_STOP_COUNT_LIMIT:
        json_fields.refuse_value("stop", f"must have at most {HTTP_STOP_COUNT_LIMIT} texts, has {len(value)}")
    return [
        json_fields.checked_text(text, f"stop[{place}]", character_limit=limit, may_be_empty=False)
        for place, text in enumerate(value)
    ]


def _read_service_tier(fields: Fields, generate: inference_pb2.GenerateRequest) -> str | None:
    tier = fields.string("service_tier", rules.NAME_CHARACTER_LIMIT)
    if tier is None:
        return None
    if tier not in SERVICE_CLASSES:
        known = ", ".join(SERVICE_CLASSES)
        json_fields.refuse_value("service_tier", f"must be one of {known}, is {json_fields.shown(tier)}")
    generate.service_class = SERVICE_CLASSES[tier]
    return tier


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.fields("stream_options")
    if options is None:
        return False
    if not stream:
        json_fields.refuse_value("stream_options", "needs stream to be true")
    include_usage = options.boolean("include_usage") or False
    options.boolean("include_obfuscation")
    options.finish(unsupported.STREAM_OPTIONS)
    return include_usage


def _read_harmless(fields: Fields) -> None:
    """Parameters that change nothing about the answer; they must only be well formed."""
    fields.boolean("store")
    for name in _HARMLESS_TEXTS:
        fields.string(name, METADATA_VALUE_CHARACTER_LIMIT)
    metadata = fields.take("metadata")
    if metadata is None:
        return
    entries = json_fields.checked_object(metadata, "metadata")
    if len(entries) > METADATA_ENTRY_LIMIT:
        json_fields.refuse_value("metadata", f"must have at most {METADATA_ENTRY_LIMIT} entries, has {len(entries)}")
    for key, value in entries.items():
        path = f"metadata.{json_fields.shown_name(key)}"
        json_fields.checked_text(key, path, character_limit=METADATA_KEY_CHARACTER_LIMIT)
        json_fields.checked_text(value, path, character_limit=METADATA_VALUE_CHARACTER_LIMIT)
