"""Named arrays to requests and back."""

from __future__ import annotations

import numpy as np
import pytest
from tensors import bundle_arrays, error_arrays, output_arrays, sequence_request, text

from llm_engine import RequestRefused, SequenceOutput

TOKENS = {"token_ids": np.array([1, 2, 3], np.int32)}


def test_absent_arrays_take_the_defaults_of_the_api():
    request = sequence_request("r", TOKENS)
    assert (request.request_id, request.prior_output_count, request.max_tokens) == ("r", 0, 16)
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.logprobs) == (1.0, None, None)


def test_every_array_reaches_the_request():
    arrays = TOKENS | {
        "prior_output_count": np.array([1], np.int32),
        "max_tokens": np.array([9], np.int32),
        "temperature": np.array([0.5], np.float32),
        "top_k": np.array([7], np.int32),
        "top_p": np.array([0.25], np.float32),
        "seed": np.array([-3], np.int64),
        "repetition_penalty": np.array([1.5], np.float32),
        "frequency_penalty": np.array([-0.5], np.float32),
        "presence_penalty": np.array([0.75], np.float32),
        "min_p": np.array([0.125], np.float32),
        "json_schema": np.array([b'{"type":"object"}'], np.object_),
        "grammar": np.array(["[é]".encode()], np.object_),
        "grammar_kind": np.array([b"regex"], np.object_),
        "logit_bias_token_ids": np.array([7, 3], np.int32),
        "logit_bias_values": np.array([-100.0, 0.5], np.float32),
        "logprobs": np.array([0], np.int32),
        "stop_token_ids": np.array([5, 6], np.int32),
        "ignore_eos": np.array([True]),
        "priority": np.array([2], np.int32),
    }
    request = sequence_request("r", arrays)
    sampling = request.sampling
    assert (request.prior_output_count, request.max_tokens, request.priority) == (1, 9, 2)
    assert (request.stop_token_ids, request.ignore_eos) == ((5, 6), True)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 7, 0.25, -3)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -0.5, 0.75)
    assert (sampling.logprobs, sampling.min_p, sampling.logit_bias) == (0, 0.125, {7: -100.0, 3: 0.5})
    assert sampling.json_schema == '{"type":"object"}'
    assert (sampling.grammar, sampling.grammar_kind) == ("[é]", "regex")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "token_ids is missing"),
        ({"token_ids": np.ones((2, 2), np.int32)}, "token_ids has shape [2, 2]"),
        (TOKENS | {"max_tokens": np.array([1, 2], np.int32)}, "max_tokens has shape [2]"),
        (TOKENS | {"seed": np.array([], np.int64)}, "seed has shape [0]"),
        (TOKENS | {"logprobs": np.array([-2], np.int32)}, "logprobs is -2"),
        (TOKENS | {"logit_bias_token_ids": np.array([1], np.int32)}, "1 tokens, and logit_bias_values 0"),
        (
            TOKENS | {"logit_bias_token_ids": np.ones(2, np.int32), "logit_bias_values": np.ones(2, np.float32)},
            "logit_bias_token_ids names a token twice",
        ),
    ],
)
def test_an_array_of_the_wrong_shape_is_refused_by_name(arrays, words):
    with pytest.raises(RequestRefused) as caught:
        sequence_request("r", arrays)
    assert (caught.value.reason, words in caught.value.message) == ("INVALID_VALUE", True)


def test_a_text_that_is_not_utf8_is_refused():
    with pytest.raises(RequestRefused, match="command is not UTF-8"):
        text({"command": np.array([b"\xff"], np.object_)}, "command")


def test_an_output_names_its_log_probabilities_only_where_asked_for(engine):
    plain = output_arrays(SequenceOutput(request_id="a", token_ids=[4]), engine.load)
    assert sorted(plain) == ["engine_load", "finish_reason", "token_ids"]
    asked = SequenceOutput(
        request_id="a", token_ids=[4], logprobs=[-1.0], top_token_ids=[[4, 5]], top_logprobs=[[-1.0, -2.0]]
    )
    arrays = output_arrays(asked, engine.load)
    assert (arrays["top_token_ids"].tolist(), arrays["top_logprobs"].tolist()) == ([[4, 5]], [[-1.0, -2.0]])


def test_a_refusal_is_reason_and_message():
    arrays = error_arrays("QUEUE_FULL", "no place", None)
    assert (arrays["error"].tolist(), arrays["finish_reason"].tolist()) == ([b"QUEUE_FULL: no place"], [b"error"])


def test_a_bundle_says_whose_tokens_are_whose(engine):
    outputs = [
        SequenceOutput(request_id="a", token_ids=[1, 2]),
        SequenceOutput(request_id="é", token_ids=[], finish_reason="stop"),
        SequenceOutput(
            request_id="c", token_ids=[], finish_reason="error", error_reason="NON_FINITE_LOGITS", error_message="at 3"
        ),
    ]
    arrays = bundle_arrays(outputs, engine.load)
    assert arrays["request_ids"].tobytes() == b"\1\0\0\0a\2\0\0\0\xc3\xa9\1\0\0\0c"
    assert (arrays["token_counts"].tolist(), arrays["token_ids"].tolist()) == ([2, 0, 0], [1, 2])
    assert arrays["finish_reasons"].tolist() == [b"", b"stop", b"error"]
    assert arrays["errors"].tolist() == [b"", b"", b"NON_FINITE_LOGITS: at 3"]


def test_what_was_not_computed_is_told_where_there_is_any(engine):
    outputs = [
        SequenceOutput(request_id="a", token_ids=[1], cached_token_count=48),
        SequenceOutput(request_id="b", token_ids=[2]),
    ]
    assert bundle_arrays(outputs, engine.load)["cached_token_counts"].tolist() == [48, 0]
    assert output_arrays(outputs[0], engine.load)["cached_token_count"].tolist() == [48]
    assert "cached_token_count" not in output_arrays(outputs[1], engine.load)


def test_whose_prompt_it_is_reaches_the_engine():
    salt = {"cache_salt": np.array([b"amber"], np.object_)}
    assert sequence_request("r", TOKENS | salt).cache_salt == "amber"
    assert sequence_request("r", TOKENS).cache_salt == ""


def test_a_bundle_of_running_sequences_carries_nothing_more(engine):
    arrays = bundle_arrays([SequenceOutput(request_id="a", token_ids=[1])], engine.load)
    assert sorted(arrays) == ["engine_load", "request_ids", "token_counts", "token_ids"]
