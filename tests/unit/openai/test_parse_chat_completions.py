from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.openai.request import OpenAIRequest, parse_chat_completions
from tidegate.v1 import inference_pb2 as pb

USER = {"role": "user", "content": "Hi"}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def parse(**fields: Any) -> OpenAIRequest:
    return parse_chat_completions(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def refusal(body: bytes | dict[str, Any]) -> TidegateError:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(TidegateError) as caught:
        parse_chat_completions(encoded)
    return caught.value


SCHEMA = {"type": "object", "properties": {"caf\u00e9": {"type": "string"}}}


def json_of(named: dict[str, Any] | None) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def test_a_bare_request_takes_the_defaults() -> None:
    request = parse()
    assert request.kind == "chat"
    assert (request.stream, request.include_usage, request.service_tier) == (False, False, None)
    assert list(request.generate.chat.messages) == [pb.ChatMessage(role="user", content="Hi")]
    assert request.generate.model == "m"
    assert not request.generate.HasField("max_tokens")
    assert not request.generate.HasField("logprobs")
    assert not request.generate.sampling.ListFields()


def test_every_parameter_arrives() -> None:
    request = parse(
        temperature=0.5,
        top_p=1,
        top_k=40,
        min_p=0.25,
        logit_bias={"7": -100, "49151": 2.5, "8": None},
        repetition_penalty=1.25,
        frequency_penalty=-2,
        presence_penalty=2.0,
        seed=-(2**63),
        stop=["a", "b"],
        max_tokens=7,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        logprobs=True,
        top_logprobs=20,
        ignore_eos=True,
        user="someone",
        service_tier="priority",
        n=1,
        store=False,
        metadata={"a": "b"},
        prompt_cache_key="k",
        safety_identifier="s",
    )
    sampling = pb.SamplingParameters(
        temperature=0.5,
        top_p=1,
        top_k=40,
        min_p=0.25,
        logit_bias={7: -100, 49151: 2.5},
        repetition_penalty=1.25,
        frequency_penalty=-2,
        presence_penalty=2,
        seed=-(2**63),
    )
    expected = pb.GenerateRequest(
        model="m",
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]),
        max_tokens=7,
        sampling=sampling,
        stop=["a", "b"],
        logprobs=20,
        service_class=pb.SERVICE_CLASS_REALTIME,
        ignore_eos=True,
        user="someone",
    )
    assert request.generate == expected
    assert (request.stream, request.include_usage, request.service_tier) == (True, True, "priority")


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, ""),
        ({"type": "json_object"}, '{"type":"object"}'),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, '{"type":"object"}'),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": SCHEMA}},
            '{"type":"object","properties":{"caf\\u00e9":{"type":"string"}}}',
        ),
    ],
)
def test_a_response_format_becomes_a_schema(response_format: dict[str, Any], schema: str) -> None:
    assert parse(response_format=response_format).generate.sampling.json_schema == schema


def test_messages_of_every_kind_arrive() -> None:
    messages = [
        {"role": "developer", "content": "D"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "function_call": None},
        {"role": "assistant", "annotations": [], "audio": None, "tool_calls": []},
        USER,
    ]
    assert list(parse(messages=messages).generate.chat.messages) == [
        pb.ChatMessage(role="developer", content="D"),
        pb.ChatMessage(role="user", name="ann", content="a\nb"),
        pb.ChatMessage(role="assistant"),
        pb.ChatMessage(role="assistant"),
        pb.ChatMessage(role="user", content="Hi"),
    ]


@pytest.mark.parametrize(
    ("tier", "service_class"),
    [
        ("auto", pb.SERVICE_CLASS_STANDARD),
        ("default", pb.SERVICE_CLASS_STANDARD),
        ("standard", pb.SERVICE_CLASS_STANDARD),
        ("priority", pb.SERVICE_CLASS_REALTIME),
        ("flex", pb.SERVICE_CLASS_BATCH),
        (None, pb.SERVICE_CLASS_UNSPECIFIED),
    ],
)
def test_a_tier_names_a_class(tier: str | None, service_class: int) -> None:
    assert parse(service_tier=tier).generate.service_class == service_class


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": []},
        {"tools": None},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"logit_bias": None},
        {"modalities": ["text"]},
        {"min_p": 0},
        {"top_k": -1},
        {"stop": None},
        {"stop": []},
        {"top_logprobs": 0},
        {"temperature": None, "top_p": None, "seed": None, "max_tokens": None, "stream": None, "n": None, "user": None},
        {"stream_options": None},
        {"model": None},
        {"separate_reasoning": True, "stream_reasoning": True, "include_reasoning": True, "no_stop_trim": False},
    ],
)
def test_what_asks_for_nothing_is_accepted(neutral: dict[str, Any]) -> None:
    assert parse(**neutral).generate.chat.messages[0].content == "Hi"


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"temperature": 2.01}, Reason.INVALID_VALUE, "temperature"),
        ({"temperature": -0.1}, Reason.INVALID_VALUE, "temperature"),
        ({"temperature": "1"}, Reason.INVALID_TYPE, "temperature"),
        ({"temperature": True}, Reason.INVALID_TYPE, "temperature"),
        ({"top_p": 0}, Reason.INVALID_VALUE, "top_p"),
        ({"top_p": 1.5}, Reason.INVALID_VALUE, "top_p"),
        ({"top_k": -2}, Reason.INVALID_VALUE, "top_k"),
        ({"top_k": 1.0}, Reason.INVALID_TYPE, "top_k"),
        ({"repetition_penalty": 0}, Reason.INVALID_VALUE, "repetition_penalty"),
        ({"frequency_penalty": 3}, Reason.INVALID_VALUE, "frequency_penalty"),
        ({"presence_penalty": [1]}, Reason.INVALID_TYPE, "presence_penalty"),
        ({"seed": 2**63}, Reason.INVALID_VALUE, "seed"),
        ({"seed": 1.0}, Reason.INVALID_TYPE, "seed"),
        ({"seed": True}, Reason.INVALID_TYPE, "seed"),
        ({"seed": 10**400}, Reason.INVALID_VALUE, "seed"),
        ({"max_tokens": 0}, Reason.INVALID_VALUE, "max_tokens"),
        ({"max_tokens": 2**31}, Reason.INVALID_VALUE, "max_tokens"),
        ({"max_tokens": 1.0}, Reason.INVALID_TYPE, "max_tokens"),
        ({"max_completion_tokens": -1}, Reason.INVALID_VALUE, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, Reason.INVALID_VALUE, "max_tokens"),
        ({"stop": ""}, Reason.INVALID_VALUE, "stop"),
        ({"stop": ["a", ""]}, Reason.INVALID_VALUE, "stop[1]"),
        ({"stop": ["a", 1]}, Reason.INVALID_TYPE, "stop[1]"),
        ({"stop": list("abcde")}, Reason.INVALID_VALUE, "stop"),
        ({"stop": {}}, Reason.INVALID_TYPE, "stop"),
        ({"stream": 1}, Reason.INVALID_TYPE, "stream"),
        ({"stream": "true"}, Reason.INVALID_TYPE, "stream"),
        ({"stream_options": {"include_usage": True}}, Reason.INVALID_VALUE, "stream_options"),
        ({"stream": True, "stream_options": []}, Reason.INVALID_TYPE, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, Reason.INVALID_TYPE, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"x": 1}}, Reason.UNKNOWN_PARAMETER, "stream_options.x"),
        ({"logprobs": 1}, Reason.INVALID_TYPE, "logprobs"),
        ({"top_logprobs": 3}, Reason.INVALID_VALUE, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, Reason.INVALID_VALUE, "top_logprobs"),
        ({"n": 2}, Reason.UNSUPPORTED_PARAMETER, "n"),
        ({"n": 0}, Reason.INVALID_VALUE, "n"),
        ({"n": True}, Reason.INVALID_TYPE, "n"),
        ({"user": "u" * 513}, Reason.INVALID_VALUE, "user"),
        ({"user": "\ud800"}, Reason.INVALID_VALUE, "user"),
        ({"model": ""}, Reason.INVALID_VALUE, "model"),
        ({"model": 1}, Reason.INVALID_TYPE, "model"),
        ({"model": "\udfff"}, Reason.INVALID_VALUE, "model"),
        ({"service_tier": "gold"}, Reason.INVALID_VALUE, "service_tier"),
        ({"ignore_eos": "no"}, Reason.INVALID_TYPE, "ignore_eos"),
        ({"store": "no"}, Reason.INVALID_TYPE, "store"),
        ({"metadata": []}, Reason.INVALID_TYPE, "metadata"),
        ({"metadata": {"a": 1}}, Reason.INVALID_TYPE, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, Reason.INVALID_VALUE, "metadata"),
        ({"tools": [{"type": "function"}]}, Reason.UNSUPPORTED_PARAMETER, "tools"),
        ({"tool_choice": "required"}, Reason.UNSUPPORTED_PARAMETER, "tool_choice"),
        ({"response_format": "json"}, Reason.INVALID_TYPE, "response_format"),
        ({"response_format": {}}, Reason.MISSING_REQUIRED_PARAMETER, "response_format.type"),
        ({"response_format": {"type": "xml"}}, Reason.INVALID_VALUE, "response_format.type"),
        ({"response_format": {"type": "json_object", "x": 1}}, Reason.UNKNOWN_PARAMETER, "response_format.x"),
        (json_of(None), Reason.MISSING_REQUIRED_PARAMETER, "response_format.json_schema"),
        (json_of({"schema": {}}), Reason.MISSING_REQUIRED_PARAMETER, "response_format.json_schema.name"),
        (json_of({"name": "n", "schema": []}), Reason.INVALID_TYPE, "response_format.json_schema.schema"),
        (json_of({"name": "n", "strict": 1}), Reason.INVALID_TYPE, "response_format.json_schema.strict"),
        (json_of({"name": "n", "x": 1}), Reason.UNKNOWN_PARAMETER, "response_format.json_schema.x"),
        (
            json_of({"name": "n", "schema": {"title": "x" * 16384}}),
            Reason.INVALID_VALUE,
            "response_format.json_schema.schema",
        ),
        ({"logit_bias": [1]}, Reason.INVALID_TYPE, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, Reason.INVALID_VALUE, "logit_bias.1"),
        ({"logit_bias": {"1": "2"}}, Reason.INVALID_TYPE, "logit_bias.1"),
        ({"logit_bias": {"1": True}}, Reason.INVALID_TYPE, "logit_bias.1"),
        ({"logit_bias": {"-1": 1}}, Reason.INVALID_VALUE, "logit_bias.-1"),
        ({"logit_bias": {"the": 1}}, Reason.INVALID_VALUE, "logit_bias.the"),
        ({"logit_bias": {"": 1}}, Reason.INVALID_VALUE, "logit_bias."),
        ({"logit_bias": {"9" * 10: 1}}, Reason.INVALID_VALUE, "logit_bias." + "9" * 10),
        ({"logit_bias": {"5": 1, "05": 1}}, Reason.INVALID_VALUE, "logit_bias.05"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, Reason.INVALID_VALUE, "logit_bias"),
        ({"reasoning_effort": "high"}, Reason.UNSUPPORTED_PARAMETER, "reasoning_effort"),
        ({"min_p": 1.5}, Reason.INVALID_VALUE, "min_p"),
        ({"min_p": -0.1}, Reason.INVALID_VALUE, "min_p"),
        ({"include_reasoning": False}, Reason.UNSUPPORTED_PARAMETER, "include_reasoning"),
        ({"best_of": 1}, Reason.UNKNOWN_PARAMETER, "best_of"),
        ({"prompt": "x"}, Reason.UNKNOWN_PARAMETER, "prompt"),
        ({"temprature": 1}, Reason.UNKNOWN_PARAMETER, "temprature"),
        ({"messages": None}, Reason.MISSING_REQUIRED_PARAMETER, "messages"),
        ({"messages": []}, Reason.INVALID_VALUE, "messages"),
        ({"messages": "Hi"}, Reason.INVALID_TYPE, "messages"),
        ({"messages": [USER] * 4097}, Reason.INVALID_VALUE, "messages"),
        ({"messages": [USER, "Hi"]}, Reason.INVALID_TYPE, "messages[1]"),
        ({"messages": [{"content": "x"}]}, Reason.MISSING_REQUIRED_PARAMETER, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "x"}]}, Reason.INVALID_TYPE, "messages[0].role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, Reason.INVALID_VALUE, "messages[0].role"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, Reason.INVALID_VALUE, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, Reason.UNSUPPORTED_PARAMETER, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, Reason.MISSING_REQUIRED_PARAMETER, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}]}, Reason.INVALID_VALUE, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, Reason.INVALID_VALUE, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, Reason.INVALID_TYPE, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": "a\ud800"}]}, Reason.INVALID_VALUE, "messages[1].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, Reason.INVALID_TYPE, "messages[0].content[0]"),
        (said([{"text": "x"}]), Reason.MISSING_REQUIRED_PARAMETER, "messages[0].content[0].type"),
        (said([{"type": "text"}]), Reason.MISSING_REQUIRED_PARAMETER, "messages[0].content[0].text"),
        (said([{"type": "text", "text": 1}]), Reason.INVALID_TYPE, "messages[0].content[0].text"),
        (said([{"type": "text", "text": "x"}, {"type": 1}]), Reason.INVALID_TYPE, "messages[0].content[1].type"),
        (said([{"type": "text", "text": "x", "y": 1}]), Reason.UNKNOWN_PARAMETER, "messages[0].content[0].y"),
        ({"messages": [{"role": "user", "content": "x", "name": "n" * 65}]}, Reason.INVALID_VALUE, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, Reason.UNKNOWN_PARAMETER, "messages[0].mood"),
        (said("x", tool_calls=[{}]), Reason.UNSUPPORTED_PARAMETER, "messages[0].tool_calls"),
    ],
)  # fmt: skip
def test_refusals_name_the_reason_and_the_field(fields: dict[str, Any], reason: Reason, field: str) -> None:
    error = refusal({"model": "m", "messages": [USER], **fields})
    assert (error.reason, error.field) == (reason, field)
    assert field in error.message
    error.message.encode()


def test_an_image_is_refused_at_its_place() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    messages = [USER, USER, USER, {"role": "user", "content": [part]}]
    error = refusal({"model": "m", "messages": messages})
    assert (error.reason, error.field) == (Reason.INVALID_VALUE, "messages[3].content[0].type")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", Reason.INVALID_JSON),
        (b"\xff", Reason.INVALID_JSON),
        (b'{"messages": [{"role": "user", "content": "\xc3"}]}', Reason.INVALID_JSON),
        (b'{"messages"', Reason.INVALID_JSON),
        (b"{}{}", Reason.INVALID_JSON),
        (b'{"temperature": NaN}', Reason.INVALID_JSON),
        (b'{"temperature": -Infinity}', Reason.INVALID_JSON),
        (b'\xef\xbb\xbf{"a": 1}', Reason.INVALID_JSON),
        ('{"a": 1}'.encode("utf-16"), Reason.INVALID_JSON),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", Reason.INVALID_JSON),
        (b'{"a": ' * 100_000, Reason.INVALID_JSON),
        (b'{"seed": ' + b"9" * 5000 + b"}", Reason.INVALID_JSON),
        (b'{"user": "a\nb"}', Reason.INVALID_JSON),
        (b"[]", Reason.INVALID_TYPE),
        (b"null", Reason.INVALID_TYPE),
        (b'"x"', Reason.INVALID_TYPE),
        (b"1", Reason.INVALID_TYPE),
        (b"{}", Reason.MISSING_REQUIRED_PARAMETER),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, reason: Reason) -> None:
    assert refusal(body).reason is reason


def test_a_number_past_the_range_of_floats_is_refused_by_name() -> None:
    error = refusal(b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}')
    assert (error.reason, error.field) == (Reason.INVALID_VALUE, "temperature")


def test_the_last_of_duplicate_keys_wins() -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "seed": 1, "seed": 2}'
    assert parse_chat_completions(body).generate.sampling.seed == 2


def test_an_unknown_name_is_shown_short_and_clean() -> None:
    error = refusal({"messages": [USER], "\ud800\n" + "x" * 1000: 1})
    assert error.reason is Reason.UNKNOWN_PARAMETER
    assert error.field.isprintable()
    assert len(error.field) < 100


def test_a_tiny_top_p_stays_above_zero() -> None:
    assert parse(top_p=1e-300).generate.sampling.top_p > 0
