from __future__ import annotations

import math

import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.openai.request import validate_generate
from tidegate.v1 import inference_pb2 as pb


def request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": "Hi"} | fields))  # type: ignore[arg-type]


def sampling(**fields: float) -> pb.GenerateRequest:
    return request(sampling=pb.SamplingParameters(**fields))  # type: ignore[arg-type]


def chat(*messages: pb.ChatMessage) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=messages))


USER = pb.ChatMessage(role="user", content="Hi")


@pytest.mark.parametrize(
    "good",
    [
        request(),
        sampling(temperature=0, top_k=0, top_p=1, repetition_penalty=2, frequency_penalty=-2, presence_penalty=2),
        sampling(seed=-1),
        sampling(json_schema='{"type":"object"}'),  # type: ignore[arg-type]
        sampling(grammar="a+", grammar_kind=pb.GRAMMAR_KIND_REGEX),
        sampling(grammar="x" * 16384, grammar_kind=pb.GRAMMAR_KIND_LARK),  # type: ignore[arg-type]
        sampling(min_p=1, logit_bias={0: -100, 7: 100}),  # type: ignore[arg-type]
        request(max_tokens=1, stop=["x"] * 16, logprobs=0, user="u" * 512, request_id="r" * 128),
        request(logprobs=20, service_class=pb.SERVICE_CLASS_BATCH, truncation=pb.TRUNCATION_POLICY_REFUSE),
        chat(*[USER] * 4096),
        chat(pb.ChatMessage(role="assistant"), USER),
        pb.GenerateRequest(tokens=pb.TokenIds(token_ids=[0])),
    ],
)
def test_what_the_proto_allows_is_accepted(good: pb.GenerateRequest) -> None:
    validate_generate(good)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (pb.GenerateRequest(text=""), "text"),
        (pb.GenerateRequest(tokens=pb.TokenIds()), "tokens.token_ids"),
        (pb.GenerateRequest(tokens=pb.TokenIds(token_ids=[1, -1])), "tokens.token_ids[1]"),
        (chat(), "chat.messages"),
        (chat(*[USER] * 4097), "chat.messages"),
        (chat(USER, pb.ChatMessage(role="tool", content="x")), "chat.messages[1].role"),
        (chat(USER, pb.ChatMessage(content="x")), "chat.messages[1].role"),
        (chat(pb.ChatMessage(role="system")), "chat.messages[0].content"),
        (chat(pb.ChatMessage(role="user", content="x", name="n" * 65)), "chat.messages[0].name"),
        (sampling(temperature=2.1), "sampling.temperature"),
        (sampling(temperature=math.nan), "sampling.temperature"),
        (sampling(temperature=-math.inf), "sampling.temperature"),
        (sampling(top_p=0), "sampling.top_p"),
        (sampling(top_p=math.nan), "sampling.top_p"),
        (sampling(top_k=-1), "sampling.top_k"),
        (sampling(json_schema="{"), "sampling.json_schema"),  # type: ignore[arg-type]
        (sampling(json_schema="[]"), "sampling.json_schema"),  # type: ignore[arg-type]
        (sampling(json_schema="[" * 9000), "sampling.json_schema"),  # type: ignore[arg-type]
        (sampling(json_schema='{"title":"' + "x" * 16384 + '"}'), "sampling.json_schema"),  # type: ignore[arg-type]
        (request(ignore_eos=True, sampling=pb.SamplingParameters(json_schema="{}")), "ignore_eos"),
        (sampling(grammar="a"), "sampling.grammar_kind"),  # type: ignore[arg-type]
        (sampling(grammar="a", grammar_kind=9), "sampling.grammar_kind"),  # type: ignore[arg-type]
        (sampling(grammar_kind=pb.GRAMMAR_KIND_LARK), "sampling.grammar_kind"),
        (sampling(grammar="a", grammar_kind=pb.GRAMMAR_KIND_LARK, json_schema="{}"), "sampling.grammar"),
        (sampling(grammar="é" * 8193, grammar_kind=pb.GRAMMAR_KIND_LARK), "sampling.grammar"),
        (
            request(ignore_eos=True, sampling=pb.SamplingParameters(grammar="a", grammar_kind=pb.GRAMMAR_KIND_REGEX)),
            "ignore_eos",
        ),
        (sampling(min_p=1.5), "sampling.min_p"),
        (sampling(min_p=math.nan), "sampling.min_p"),
        (sampling(logit_bias={-1: 1}), "sampling.logit_bias.-1"),  # type: ignore[arg-type]
        (sampling(logit_bias={3: 101}), "sampling.logit_bias.3"),  # type: ignore[arg-type]
        (sampling(logit_bias={3: math.nan}), "sampling.logit_bias.3"),  # type: ignore[arg-type]
        (sampling(logit_bias=dict.fromkeys(range(1025), 1)), "sampling.logit_bias"),  # type: ignore[arg-type]
        (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
        (sampling(repetition_penalty=2.5), "sampling.repetition_penalty"),
        (sampling(frequency_penalty=-2.5), "sampling.frequency_penalty"),
        (sampling(presence_penalty=math.inf), "sampling.presence_penalty"),
        (request(max_tokens=0), "max_tokens"),
        (request(max_tokens=-1), "max_tokens"),
        (request(logprobs=21), "logprobs"),
        (request(logprobs=-1), "logprobs"),
        (request(stop=["x"] * 17), "stop"),
        (request(stop=["x", ""]), "stop[1]"),
        (request(stop=["x" * 1025]), "stop[0]"),
        (request(service_class=9), "service_class"),
        (request(truncation=9), "truncation"),
        (request(user="u" * 513), "user"),
        (request(request_id="r" * 129), "request_id"),
        (request(request_id="a\nb"), "request_id"),
        (request(model="m" * 257), "model"),
        (request(resume=pb.TokenIds(token_ids=[-5])), "resume.token_ids[0]"),
    ],
)
def test_what_it_does_not_allow_is_refused_by_its_field(bad: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(TidegateError) as caught:
        validate_generate(bad)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_VALUE, field)


def test_a_request_without_a_prompt_is_refused() -> None:
    with pytest.raises(TidegateError) as caught:
        validate_generate(pb.GenerateRequest())
    assert (caught.value.reason, caught.value.field) == (Reason.MISSING_REQUIRED_PARAMETER, "prompt")
