from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.text.blocks import block_hashes
from tidegate.text.model_files import TextModel
from tidegate.text.prompt import openai_field, prepare_prompt
from tidegate.v1 import inference_pb2 as pb


def small(model: TextModel, context_token_count: int) -> TextModel:
    return dataclasses.replace(model, context_token_count=context_token_count)


def chat(*texts: str, **fields: object) -> pb.GenerateRequest:
    roles = ["user", "assistant"]
    messages = [pb.ChatMessage(role="system", content="Be brief.")]
    messages += [pb.ChatMessage(role=roles[i % 2], content=text) for i, text in enumerate(texts)]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages), **fields)  # type: ignore[arg-type]


def tokens(*token_ids: int, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(tokens=pb.TokenIds(token_ids=token_ids), **fields)  # type: ignore[arg-type]


def refusal(request: pb.GenerateRequest, model: TextModel, **options: bool) -> TidegateError:
    with pytest.raises(TidegateError) as caught:
        prepare_prompt(request, model, "t", **options)
    return caught.value


def test_a_chat_becomes_its_templates_tokens(model: TextModel) -> None:
    request = chat("Hi")
    prompt = prepare_prompt(request, model, "t")
    expected = model.chat_template.encode(request.chat.messages, model.tokenizer)
    assert prompt.token_ids.tolist() == expected
    assert prompt.token_ids.dtype == np.int32
    assert prompt.prompt_token_count == len(expected)
    assert prompt.max_tokens == 8192 - len(expected)
    assert prompt.truncated_token_count == 0
    assert prompt.model == model.name
    assert prompt.service_class == pb.SERVICE_CLASS_STANDARD
    assert prompt.block_hashes == tuple(block_hashes(expected, model=model.name, tenant="t"))
    assert prompt.answer_key == b""


def test_plain_text_has_no_special_tokens(model: TextModel) -> None:
    prompt = prepare_prompt(pb.GenerateRequest(text="a<|im_end|>"), model, "t")
    assert model.tokenizer.decode(prompt.token_ids) == "a<|im_end|>"


def test_tokens_are_taken_as_they_are(model: TextModel) -> None:
    assert prepare_prompt(tokens(1, 2, 49151), model, "t").token_ids.tolist() == [1, 2, 49151]


def test_the_class_that_is_asked_for_stays(model: TextModel) -> None:
    request = tokens(1, service_class=pb.SERVICE_CLASS_BATCH)
    assert prepare_prompt(request, model, "t").service_class == pb.SERVICE_CLASS_BATCH


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (7, 7), (8, 7), (2**31 - 1, 7)])
def test_the_context_limits_the_answer(model: TextModel, asked: int, given: int) -> None:
    assert prepare_prompt(tokens(1, 2, 3, max_tokens=asked), small(model, 10), "t").max_tokens == given


@pytest.mark.parametrize("token_count", [10, 11, 5000])
def test_a_prompt_without_room_for_an_answer_is_refused_with_both_lengths(model: TextModel, token_count: int) -> None:
    error = refusal(tokens(*[5] * token_count), small(model, 10))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert error.field == "tokens.token_ids"
    assert f"{token_count} tokens" in error.message
    assert "room for 9" in error.message


def test_the_longest_prompt_leaves_one_token(model: TextModel) -> None:
    assert prepare_prompt(tokens(*[5] * 9), small(model, 10), "t").max_tokens == 1


@pytest.mark.parametrize(
    ("request_", "reason", "field", "openai"),
    [
        (tokens(1, model="other"), Reason.MODEL_NOT_FOUND, "model", "model"),
        (tokens(1, 49152), Reason.INVALID_VALUE, "tokens.token_ids[1]", "prompt[1]"),
        (tokens(-1), Reason.INVALID_VALUE, "tokens.token_ids[0]", "prompt[0]"),
        (tokens(1, sampling=pb.SamplingParameters(top_k=49153)), Reason.INVALID_VALUE, "sampling.top_k", "top_k"),
        (
            tokens(1, sampling=pb.SamplingParameters(logit_bias={5: 1, 49152: 1})),
            Reason.INVALID_VALUE,
            "sampling.logit_bias.49152",
            "logit_bias.49152",
        ),
        (tokens(1, sampling=pb.SamplingParameters(top_p=0)), Reason.INVALID_VALUE, "sampling.top_p", "top_p"),
        (pb.GenerateRequest(), Reason.MISSING_REQUIRED_PARAMETER, "prompt", "prompt"),
        (pb.GenerateRequest(text="\x04"), Reason.INVALID_VALUE, "text", "prompt"),
        (pb.GenerateRequest(text="word " * 9000), Reason.CONTEXT_LENGTH_EXCEEDED, "text", "prompt"),
        (chat("word " * 9000), Reason.CONTEXT_LENGTH_EXCEEDED, "chat.messages", "messages"),
        (chat(""), Reason.INVALID_VALUE, "chat.messages[1].content", "messages[1].content"),
        (
            tokens(1, resume=pb.TokenIds(token_ids=[49152])),
            Reason.INVALID_VALUE,
            "resume.token_ids[0]",
            "resume.token_ids[0]",
        ),
        (
            tokens(1, max_tokens=1, resume=pb.TokenIds(token_ids=[1, 1])),
            Reason.INVALID_VALUE,
            "resume.token_ids",
            "resume.token_ids",
        ),
    ],
)
def test_refusals_name_the_field_of_either_surface(
    model: TextModel, request_: pb.GenerateRequest, reason: Reason, field: str, openai: str
) -> None:
    typed = refusal(request_, model)
    assert (typed.reason, typed.field) == (reason, field)
    http = refusal(request_, model, openai_names=True)
    assert (http.reason, http.field) == (reason, openai)
    if field != openai:
        assert f"'{field}'" not in http.message


def test_openai_names_of_fields() -> None:
    assert openai_field("sampling.seed") == "seed"
    assert openai_field("sampling.json_schema") == "response_format"
    assert openai_field("sampling.grammar") == "structured_outputs"
    assert openai_field("sampling.json_schema", "guided_json") == "guided_json"
    assert openai_field("sampling.grammar", "guided_regex") == "guided_regex"
    assert openai_field("stop[3]") == "stop[3]"
    assert openai_field("") == ""


@pytest.mark.parametrize("count", range(1, 8))
def test_dropping_the_oldest_messages_keeps_the_systems_and_the_last(model: TextModel, count: int) -> None:
    texts = [f"number {i} " + "word " * 20 for i in range(count)]
    request = chat(*texts, max_tokens=8, truncation=pb.TRUNCATION_POLICY_DROP_OLDEST)
    whole = model.chat_template.encode(request.chat.messages, model.tokenizer)
    prompt = prepare_prompt(request, small(model, 108), "t")
    kept = [text for text in texts if text in model.tokenizer.decode(prompt.token_ids)]
    assert kept == texts[len(texts) - len(kept) :]
    assert kept
    assert "Be brief." in model.tokenizer.decode(prompt.token_ids)
    assert prompt.prompt_token_count <= 100
    assert prompt.truncated_token_count == len(whole) - prompt.prompt_token_count
    # One message more would not have fitted.
    if len(kept) < len(texts):
        more = chat(*texts)
        del more.chat.messages[1 : len(texts) - len(kept)]
        assert len(model.chat_template.encode(more.chat.messages, model.tokenizer)) > 100


def test_a_last_message_that_does_not_fit_is_refused_all_the_same(model: TextModel) -> None:
    request = chat("a", "b", "word " * 200, truncation=pb.TRUNCATION_POLICY_DROP_OLDEST)
    assert refusal(request, small(model, 100)).reason is Reason.CONTEXT_LENGTH_EXCEEDED


def test_nothing_is_dropped_from_what_fits(model: TextModel) -> None:
    request = chat("a", "b", "c", max_tokens=4, truncation=pb.TRUNCATION_POLICY_DROP_OLDEST)
    assert prepare_prompt(request, model, "t").truncated_token_count == 0


@pytest.mark.parametrize(("max_tokens", "kept"), [(10, 90), (90, 50), (None, 75)])
def test_dropping_the_oldest_tokens_leaves_room_for_the_answer(
    model: TextModel, max_tokens: int | None, kept: int
) -> None:
    request = tokens(*range(200), max_tokens=max_tokens, truncation=pb.TRUNCATION_POLICY_DROP_OLDEST)
    prompt = prepare_prompt(request, small(model, 100), "t")
    assert prompt.token_ids.tolist() == list(range(200))[-kept:]
    assert prompt.truncated_token_count == 200 - kept


def test_a_deterministic_request_has_a_key_that_is_its_tenants(model: TextModel) -> None:
    request = tokens(1, sampling=pb.SamplingParameters(temperature=0))
    keys = {prepare_prompt(request, model, tenant).answer_key for tenant in ("a", "b", "a")}
    assert [len(one) for one in keys] == [32, 32]


def test_a_resumed_answer_has_no_key_and_the_same_prompt(model: TextModel) -> None:
    request = tokens(1, sampling=pb.SamplingParameters(temperature=0), resume=pb.TokenIds(token_ids=[4]))
    prompt = prepare_prompt(request, model, "t")
    assert prompt.answer_key == b""
    assert prompt.token_ids.tolist() == [1]


@pytest.mark.parametrize(
    "request_", [pb.GenerateRequest(text="a" * 3_000_000), chat("a" * 3_000_000)], ids=["text", "chat"]
)
def test_millions_of_letters_are_refused_without_being_encoded(model: TextModel, request_: pb.GenerateRequest) -> None:
    before = time.process_time()
    error = refusal(request_, model)
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert "at least" in error.message
    assert time.process_time() - before < 0.5
