"""Models divided among ranks: the same logits, and an end instead of a hang when one of them dies."""

import dataclasses
import os
import signal
import threading
import time

import pytest
import torch
from small_models import LATENT, SHAPES, decoded, save_spoiled_model, small_model, tokens_of

SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True}


@pytest.fixture
def make_ranks(make_engine):
    """An engine of several ranks, whose processes end with the test."""
    engines = []

    def make(path, size, **settings):
        settings = {"kv_cache_bytes": 1 << 22, "step_token_budget": 48, "thread_count": 1, **settings}
        engines.append(make_engine(path, tensor_parallel_size=size, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def make_running(tmp_path, make_ranks):
    """An engine of several ranks that is in the middle of a text."""

    def make(size, **settings):
        from llm_engine import SequenceRequest

        small_model().save_pretrained(tmp_path)
        engine = make_ranks(tmp_path, size, **settings)
        engine.add(SequenceRequest(request_id="a", token_ids=tokens_of(10), max_tokens=50, ignore_eos=True))
        engine.step()
        return engine

    return make


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (SMOLLM2, 2),
        (SMOLLM2, 3),
        (SMOLLM2, 4),
        (SHAPES["grouped"], 3),
        (SHAPES["qwen2"], 3),
        (SHAPES["qwen3"], 3),
        (SHAPES["qwen3, one kv head, tied"], 4),
        (SHAPES["qwen3_moe"], 2),
        (SHAPES["deepseek_v2, groups, no query latent"], 2),
        (SHAPES["deepseek_v3"], 2),
        (SHAPES["deepseek_v3"], 3),
        (SHAPES["deepseek_v3, yarn"], 3),
        (SHAPES["deepseek_v3"], 4),
    ],
    ids=[
        "llama, uneven heads, 2", "llama, uneven heads, 3", "llama, uneven heads, 4", "llama, 3", "qwen2, 3",
        "qwen3, 3", "qwen3, one kv head, 4", "qwen3_moe, 2", "deepseek_v2, 2", "deepseek_v3, 2", "deepseek_v3, 3",
        "deepseek_v3, yarn, 3", "deepseek_v3, 4",
    ],
)  # fmt: skip
def test_logits_and_texts_are_those_of_one_rank(tmp_path, make_ranks, prompt_logits, reference_logits, shape, size):
    model = small_model(**shape)
    model.save_pretrained(tmp_path)
    engine = make_ranks(tmp_path, size)
    for count in (1, 130):
        expected = reference_logits(model, tokens_of(count))
        difference = (prompt_logits(engine, tokens_of(count)) - expected).abs().max()
        assert difference < 1e-3, count
    prompts = {str(count): tokens_of(count) for count in (3, 20, 60, 90)}
    found, expected = decoded(engine, prompts, 20), decoded(make_ranks(tmp_path, 1), prompts, 20)
    for name, (tokens, _, likeliest) in found.items():
        assert tokens == expected[name][0], name
        assert torch.tensor(likeliest).allclose(torch.tensor(expected[name][2]), rtol=0, atol=1e-3), name


def test_a_rank_that_dies_ends_the_engine_at_once(make_running):
    from llm_engine import EngineBroken

    engine = make_running(3)
    told, words = threading.Event(), []
    engine.watch(lambda message: (words.append(message), told.set()))
    os.kill(engine._rank._others[1]._process.pid, signal.SIGKILL)
    assert told.wait(10)
    assert words == ["rank 2 has ended, with status -9"]
    with pytest.raises(EngineBroken, match="rank"):
        for _ in range(2):
            engine.step()


def test_what_tells_a_whole_group_to_end_leaves_the_other_ranks_to_the_first(make_running):
    engine = make_running(2)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine._rank._others[0]._process.pid, number)
        assert engine.step()
        assert engine.step()


def test_a_step_that_fails_on_the_first_rank_ends_the_engine_for_the_others_are_in_the_middle_of_it(
    make_running, monkeypatch
):
    from llm_engine import EngineBroken

    engine = make_running(2)

    def fail(step):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(engine._rank._rank, "forward", fail)
    with pytest.raises(EngineBroken, match="rank 0 of 2 failed in a step of all: not enough memory"):
        engine.step()


def test_a_rank_that_hangs_is_given_up(make_running):
    from llm_engine import EngineBroken

    engine = make_running(2, collective_timeout_seconds=4.0)
    os.kill(engine._rank._others[0]._process.pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    with pytest.raises(EngineBroken, match="rank 0 of 2 lost the others"):
        engine.step()
    assert time.monotonic() - stopped_at < 10


def test_a_rank_that_hangs_is_given_up_also_while_it_is_told_more_than_its_connection_holds(tmp_path, make_ranks):
    from llm_engine import EngineBroken
    from llm_engine.step_tensors import RowWork

    small_model().save_pretrained(tmp_path)
    engine = make_ranks(tmp_path, 2, collective_timeout_seconds=2.0)
    step = engine._rank.lay_out([RowWork(0, [1], [0], 1)])
    large = dataclasses.replace(step, works=[RowWork(0, [1], list(range(1 << 18)), 1)])
    os.kill(engine._rank._others[0]._process.pid, signal.SIGSTOP)
    with pytest.raises(EngineBroken, match=r"rank 1 has not taken an order of \d{6,} bytes in time"):
        engine._rank.forward(large)


def test_a_rank_that_cannot_load_is_named(tmp_path, make_ranks):
    from llm_engine import ModelLoadError

    save_spoiled_model(tmp_path)
    with pytest.raises(ModelLoadError, match=r"rank 1: .*model.layers.1.mlp.up_proj.weight holds 1 .* at \[159, 0\]"):
        make_ranks(tmp_path, 2)


@pytest.mark.parametrize(
    ("shape", "size", "words"),
    [
        ({}, 7, "2 KV heads with 3 query heads each"),
        ({**SHAPES["deepseek_v3"], **LATENT}, 7, "6 query heads"),
        ({**SHAPES["qwen3_moe"], "num_experts": 4}, 5, "4 experts"),
    ],
)
def test_sizes_that_cannot_work_are_refused(tmp_path, make_ranks, shape, size, words):
    from llm_engine import ModelLoadError

    small_model(**shape).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=f"tensor_parallel_size is {size}, and {words}"):
        make_ranks(tmp_path, size)
