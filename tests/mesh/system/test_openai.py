"""The official `openai` client against the ingress: whole, streamed and asynchronous, with exact usage and errors."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tidegate.cli.config import default_model_path
from tidegate.text.model_files import load_text_model

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
RENDERED_QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
GREEDY = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(mesh: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_text_model(default_model_path(), MODEL).tokenizer


def test_the_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tidegate"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-9")
    assert raised.value.code == "model_not_found"


def test_a_second_turn_reuses_what_the_first_one_computed(client: openai.OpenAI) -> None:
    opening = "Tell me of a lighthouse at the end of a long pier, of its keeper, and of the boats that come home late. "
    messages = [{"role": "user", "content": opening * 4}]
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 24}
    first = client.chat.completions.create(messages=messages, **fields)
    messages += [
        first.choices[0].message.model_dump(include={"role", "content"}),
        {"role": "user", "content": "Go on."},
    ]
    second = client.chat.completions.create(messages=messages, **fields)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    reused = second.usage.prompt_tokens_details.cached_tokens
    assert reused is not None
    # Whole blocks of 16 tokens.
    assert first.usage.prompt_tokens - 16 < reused < second.usage.prompt_tokens
    assert reused % 16 == 0


def test_a_chat_is_the_same_whole_and_streamed_with_exact_usage(client: openai.OpenAI, tokenizer: Any) -> None:
    # Log-probabilities make it another answer to the cache, so both are generated.
    whole = client.chat.completions.create(**GREEDY, logprobs=True)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    text = "".join(each.choices[0].delta.content or "" for each in parts)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert last.choices == []
    assert last.usage is not None and whole.usage is not None
    assert last.usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert whole.usage.prompt_tokens == len(tokenizer.encode(RENDERED_QUESTION, allow_special=True))
    # The token that ends the text is counted, and is not part of the answer.
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content) + 1
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert [each.usage for each in parts] == [None] * len(parts)
    assert [each.choices[0].delta.role for each in parts if each.choices[0].delta.role] == ["assistant"]
    reasons = [each.choices[0].finish_reason for each in parts]
    assert reasons == [None] * (len(parts) - 1) + [whole.choices[0].finish_reason]
    assert len({each.id for each in chunks}) == 1
    assert {each.object for each in chunks} == {"chat.completion.chunk"}


def test_max_tokens_is_counted_exactly(client: openai.OpenAI) -> None:
    fields = GREEDY | {"messages": [{"role": "user", "content": "Tell me a long story."}]}
    del fields["max_tokens"]
    answer = client.chat.completions.create(**fields, max_completion_tokens=7)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_a_completion_takes_text_or_tokens_and_streams(client: openai.OpenAI, tokenizer: Any) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    token_ids = list(tokenizer.encode("The tide comes in", allow_special=False))
    of_text = client.completions.create(prompt="The tide comes in", **fields)
    of_tokens = client.completions.create(prompt=token_ids, logprobs=0, **fields)
    streamed = list(client.completions.create(prompt=[token_ids], logprobs=1, stream=True, **fields))
    assert of_text.choices[0].text
    assert of_tokens.choices[0].text == of_text.choices[0].text
    assert "".join(each.choices[0].text for each in streamed) == of_text.choices[0].text
    assert of_text.usage.prompt_tokens == of_tokens.usage.prompt_tokens == len(token_ids)
    assert of_text.usage.completion_tokens == len(of_tokens.choices[0].logprobs.tokens) == 12
    assert {each.object for each in [of_text, of_tokens, *streamed]} == {"text_completion"}


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Count: one, two,", temperature=0, max_tokens=24, logprobs=0)
    text, tokens = whole.choices[0].text, whole.choices[0].logprobs.tokens
    # From the middle of one token into the next one, so no token is the stop text.
    seam = len("".join(tokens[:8]))
    stop = text[seam - 2 : seam + 2]
    assert stop not in tokens
    fields: dict[str, Any] = {"model": MODEL, "prompt": "Count: one, two,", "temperature": 0, "max_tokens": 24}
    stopped = client.completions.create(**fields, stop=["never said", stop])
    streamed = list(client.completions.create(**fields, stop=stop, stream=True))
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert "".join(each.choices[0].text for each in streamed) == stopped.choices[0].text
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_again_and_the_cache_says_when_it_told_it(client: openai.OpenAI) -> None:
    fields = GREEDY | {"temperature": 1.0, "seed": 4711, "messages": [{"role": "user", "content": "Name a harbour."}]}
    create = client.chat.completions.with_raw_response.create
    first = create(**fields)
    again = create(**fields)
    generated = create(**fields, logprobs=True)
    other = create(**fields | {"seed": 4712})
    texts = [each.parse().choices[0].message.content for each in (first, again, generated, other)]
    assert [each.headers.get("x-tidegate-cache") for each in (first, again, generated, other)] == [
        None,
        "hit",
        None,
        None,
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert first.parse().usage.completion_tokens == again.parse().usage.completion_tokens
    assert first.request_id != again.request_id
    streamed = create(**fields, stream=True)
    assert streamed.headers["x-tidegate-cache"] == "hit"
    assert "".join(each.choices[0].delta.content or "" for each in streamed.parse()) == texts[0]


def test_without_seed_and_temperature_0_nothing_is_remembered(client: openai.OpenAI) -> None:
    fields = GREEDY | {"temperature": 1.5, "max_tokens": 16}
    answers = [client.chat.completions.with_raw_response.create(**fields) for _ in range(2)]
    assert [each.headers.get("x-tidegate-cache") for each in answers] == [None, None]
    assert len({each.parse().choices[0].message.content for each in answers}) == 2


def test_logprobs_are_of_the_tokens_that_were_said(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3).choices[0]
    assert bytes(byte for entry in chat.logprobs.content for byte in entry.bytes).decode() == chat.message.content
    for entry in chat.logprobs.content:
        likeliest = [other.logprob for other in entry.top_logprobs]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert entry.logprob == likeliest[0] <= 0
        assert entry.token == entry.top_logprobs[0].token
    text = client.completions.create(model=MODEL, prompt="The sea is", temperature=0, max_tokens=6, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert "".join(logprobs.tokens) == text.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:place])) for place in range(6)]
    assert [tops[token] for tops, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)] == (
        logprobs.token_logprobs
    )


def test_logit_bias_forces_and_forbids_tokens_and_min_p_1_is_greedy(client: openai.OpenAI, tokenizer: Any) -> None:
    plain = client.chat.completions.create(**GREEDY)
    (sea,) = tokenizer.encode(" sea", allow_special=False)
    forced = client.chat.completions.create(**GREEDY | {"max_tokens": 3}, logit_bias={str(sea): 100})
    assert forced.choices[0].message.content == " sea sea sea"
    said = tokenizer.encode(plain.choices[0].message.content, allow_special=False)
    other = client.chat.completions.create(**GREEDY, logit_bias={str(token): -100 for token in said})
    assert not set(said) & set(tokenizer.encode(other.choices[0].message.content, allow_special=False))
    hot: dict[str, Any] = GREEDY | {"temperature": 1.5, "extra_body": {"min_p": 1}}
    assert client.chat.completions.create(**hot).choices[0].message == plain.choices[0].message
    # What a bias changed must not be told to whoever asks without it.
    assert client.chat.completions.create(**GREEDY).choices[0].message == plain.choices[0].message


def test_a_response_format_makes_the_answer_json_of_its_schema(client: openai.OpenAI) -> None:
    parts = {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}}
    city = {"type": "object", "properties": parts, "required": ["city", "people"], "additionalProperties": False}
    asked: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": city, "strict": True}}
    for temperature in (0, 1):
        fields = GREEDY | {"temperature": temperature, "max_tokens": 60, "seed": 3}
        whole = client.chat.completions.create(**fields, response_format=asked).choices[0]
        assert whole.finish_reason == "stop"
        assert set(json.loads(whole.message.content)) == {"city", "people"}
        stream = client.chat.completions.create(**fields, response_format=asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content
    any_object = client.chat.completions.create(**GREEDY, response_format={"type": "json_object"})
    assert any_object.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"structured_outputs": {"regex": "[A-Z][a-z]{2,9} [0-9]{3}"}}, "[A-Z][a-z]{2,9} [0-9]{3}"),
        ({"structured_outputs": {"choice": ["ebb (low)", "flood"]}}, r"ebb \(low\)|flood"),
        ({"structured_outputs": {"grammar": 'start: N ("+" N)~2\nN: /[0-9]{1,3}/'}}, r"\d{1,3}(\+\d{1,3}){2}"),
        ({"guided_json": {"enum": [17]}}, "17"),
    ],
)
def test_structured_outputs_make_the_answer_what_they_describe(
    client: openai.OpenAI, asked: dict[str, Any], expected: str
) -> None:
    fields = GREEDY | {"max_tokens": 40, "extra_body": asked}
    chat = client.chat.completions.create(**fields).choices[0]
    assert chat.finish_reason == "stop" and re.fullmatch(expected, chat.message.content or "")
    prompt = {"prompt": "The tide is", **{name: value for name, value in fields.items() if name != "messages"}}
    completion = client.completions.create(**prompt).choices[0]
    assert completion.finish_reason == "stop" and re.fullmatch(expected, completion.text)


@pytest.mark.parametrize(("asked", "served"), [("auto", "default"), ("flex", "flex"), ("priority", "priority")])
def test_the_service_tier_is_that_which_served(client: openai.OpenAI, asked: str, served: str) -> None:
    fields: dict[str, Any] = GREEDY | {"max_tokens": 1, "service_tier": asked}
    assert client.chat.completions.create(**fields).service_tier == served


@pytest.mark.parametrize(
    ("kind", "fields", "code", "param"),
    [
        (openai.BadRequestError, {"temperature": 9}, "invalid_value", "temperature"),
        (openai.BadRequestError, {"n": 3}, "unsupported_parameter", "n"),
        (openai.BadRequestError, {"logit_bias": {"49152": 1}}, "invalid_value", "logit_bias.49152"),
        (openai.BadRequestError, {"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1"),
        (openai.BadRequestError, {"extra_body": {"min_p": 2}}, "invalid_value", "min_p"),
        (
            openai.BadRequestError,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "thing"}}}},
            "invalid_value",
            "response_format",
        ),
        (
            openai.BadRequestError,
            {"extra_body": {"structured_outputs": {"grammar": "start: word"}}},
            "invalid_value",
            "structured_outputs.grammar",
        ),
        (openai.BadRequestError, {"extra_body": {"guided_regex": "a("}}, "invalid_value", "guided_regex"),
        (openai.BadRequestError, {"extra_body": {"colour": "red"}}, "unknown_parameter", "colour"),
        (
            openai.BadRequestError,
            {"messages": [{"role": "user", "content": "tide " * 10_000}]},
            "context_length_exceeded",
            "messages",
        ),
        (openai.NotFoundError, {"model": "gpt-9"}, "model_not_found", "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_errors_are_the_clients_own_exceptions(
    client: openai.OpenAI,
    kind: type[openai.APIStatusError],
    fields: dict[str, Any],
    code: str,
    param: str,
    stream: bool,
) -> None:
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**GREEDY | fields, stream=stream)
    error = raised.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert error.request_id
    assert error.response.headers["x-should-retry"] == "false"


async def test_the_asynchronous_client_runs_many_streams_at_once(mesh: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def answer(number: int) -> tuple[int, str]:
            messages = [{"role": "user", "content": f"Write about the number {number}."}]
            fields: dict[str, Any] = GREEDY | {"messages": messages, "max_tokens": 16}
            stream = await client.chat.completions.create(
                **fields, seed=1, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
            return chunks[-1].usage.completion_tokens, text

        answers = await asyncio.gather(*(answer(number) for number in range(12)))
        assert all(0 < count <= 16 and text for count, text in answers)
        assert len({text for _, text in answers}) > 1
        listed = [each.id async for each in client.models.list()]
        assert listed == [MODEL]


def test_a_stream_is_server_sent_events_that_end_with_done(mesh: Any) -> None:
    body = GREEDY | {"max_tokens": 5, "stream": True, "seed": 5}
    with httpx.stream("POST", f"{mesh.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "grpc-status" not in response.headers
        events = response.read().decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(each.startswith("data: ") for each in events)
    assert {json.loads(each.removeprefix("data: "))["object"] for each in events[:-1]} == {"chat.completion.chunk"}


def test_every_response_has_a_request_id_of_its_own(mesh: Any) -> None:
    bodies: list[Any] = [
        GREEDY | {"max_tokens": 1},
        GREEDY | {"max_tokens": 1},
        GREEDY | {"max_tokens": 1, "stream": True},
        {"messages": []},
    ]
    with httpx.Client(base_url=mesh.url, timeout=60, headers={"x-request-id": "chosen-by-the-client"}) as http:
        responses = [http.post("/v1/chat/completions", json=body) for body in bodies]
        responses += [http.get(path) for path in ("/v1/models", "/v1/models/gpt-9", "/nothing", "/health", "/healthz")]
    assert [each.status_code for each in responses] == [200, 200, 200, 400, 200, 404, 404, 200, 200]
    ids = [each.headers.get("x-request-id") for each in responses]
    assert all(ids) and len(set(ids)) == len(ids) and "chosen-by-the-client" not in ids
