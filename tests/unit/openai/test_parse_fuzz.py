"""Whatever a body holds, a parser either understands it or raises a TidegateError that every surface can carry."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tidegate.common.errors import TidegateError, openai_json, trailing_metadata
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions, validate_generate

# fmt: off
FIELDS = [
    "model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos", "seed",
    "frequency_penalty", "presence_penalty", "stop", "max_tokens", "max_completion_tokens", "stream",
    "stream_options", "logprobs", "top_logprobs", "n", "best_of", "echo", "user", "service_tier", "metadata", "store",
    "tools", "tool_choice", "response_format",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "json", "regex", "choice",
    "grammar",
    "json_schema", "schema", "logit_bias", "suffix", "modalities", "prompt_cache_key", "role",
    "content", "name", "type", "text", "include_usage", "x", "7", "07",
]
# fmt: on

ATOMS: list[Any] = [None, True, False, 0, 1, -1, 2, 16, 20, 2**31, 2**63, -(2**63), 10**300, 0.0, 0.5, 1.0, -0.0, 1e308]
ATOMS += [
    "",
    "x",
    "user",
    "assistant",
    "text",
    "auto",
    "flex",
    "\ud800",
    "\udfff\ud800",
    "\x00",
    "é👍",
    "y" * 2000,
    "<|im_end|>",
]

GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}


def any_value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(6 if depth < 4 else 4)
    if kind < 4:
        return chance.choice(ATOMS)
    if kind == 4:
        return [any_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice([*FIELDS, "\ud800"]): any_value(chance, depth + 1) for _ in range(chance.randrange(5))}


def check(body: bytes) -> None:
    for parse in (parse_chat_completions, parse_completions):
        try:
            request = parse(body)
        except TidegateError as error:
            openai_json(error).encode("ascii")
            error.message.encode("utf-8")
            trailing_metadata(error)
        else:
            assert isinstance(request, OpenAIRequest)
            # What the HTTP surface accepts, the typed surface's rules accept too.
            validate_generate(request.generate)


@pytest.mark.parametrize("seed", range(8))
def test_any_values_in_any_fields(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(250):
        body = dict(GOOD) if chance.random() < 0.7 else {"prompt": "x"}
        for _ in range(chance.randrange(1, 4)):
            body[chance.choice(FIELDS)] = any_value(chance)
        check(json.dumps(body).encode())


@pytest.mark.parametrize("seed", range(4))
def test_any_values_inside_a_message(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(250):
        message = {"role": "user", "content": "Hi", chance.choice(FIELDS): any_value(chance)}
        check(json.dumps({**GOOD, "messages": [message, any_value(chance)]}).encode())
        check(json.dumps({**GOOD, "messages": [{"role": "user", "content": [any_value(chance)]}]}).encode())


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_the_bytes(seed: int) -> None:
    chance = random.Random(seed)
    good = json.dumps({**GOOD, "stop": ["a"], "temperature": 0.5, "stream": True}).encode()
    for _ in range(500):
        body = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(body))
            body[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        check(bytes(body))
