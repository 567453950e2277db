"""Small random models of every supported shape, against transformers."""

import random

import pytest
import torch
from small_models import SHAPES, decoded, small_model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shard", ["50GB", "300KB"], ids=["one file, by kernels", "sharded, by torch"])
def test_logits_are_those_of_transformers(tmp_path, make_engine, prompt_logits, reference_logits, shape, shard):
    for seed in range(2):
        model = small_model(**SHAPES[shape], seed=seed)
        folder = tmp_path / str(seed)
        model.save_pretrained(folder, max_shard_size=shard)
        assert (folder / "model.safetensors.index.json").exists() == (shard != "50GB")
        engine = make_engine(folder, kv_cache_bytes=1 << 24, step_token_budget=48, cpu_kernels=shard == "50GB")
        assert engine.model_info.eos_token_ids == (7,)
        for count in (1, 5, 200):
            tokens = torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(count)).tolist()
            expected = reference_logits(model, tokens)
            difference = (prompt_logits(engine, tokens) - expected).abs().max()
            assert difference < min(1e-3, 1e-4 * expected.abs().max()), (shape, seed, count)


@pytest.mark.parametrize(("cpu_kernels", "seed"), [(True, 2), (False, 3)], ids=["by kernels", "by torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_together_and_alone_gives_the_log_probabilities_of_transformers(
    tmp_path, make_engine, reference_logits, shape, cpu_kernels, seed
):
    model = small_model(**SHAPES[shape], seed=seed)
    model.save_pretrained(tmp_path)
    settings = {"kv_cache_bytes": 1 << 24, "step_token_budget": 48, "prefix_reuse": False}
    engine = make_engine(tmp_path, cpu_kernels=cpu_kernels, **settings)
    # The sizes of the other latents are no whole vectors on every processor.
    if shape == "deepseek_v3, whole vectors" or "deepseek" not in shape:
        assert engine._rank.kv_cache.reads_blocks == cpu_kernels
    source = torch.Generator().manual_seed(seed + 1)
    prompts = {str(count): torch.randint(0, 300, (count,), generator=source).tolist() for count in (1, 9, 30, 60, 100)}
    together, alone = decoded(engine, prompts, 12), decoded(engine, {"60": prompts["60"]}, 12)
    assert alone["60"][0] == together["60"][0]
    for name, (tokens, logprobs, likeliest) in [*together.items(), *alone.items()]:
        prompt = prompts[name]
        expected = reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1].log_softmax(dim=-1)
        chosen = expected.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (chosen - torch.tensor(logprobs)).abs().max() < 1e-3, name
        assert (expected.max(dim=1).values - chosen).max() < 1e-3, name
        found = torch.tensor(likeliest)
        assert (expected.topk(found.shape[1], dim=1).values - found).abs().max() < 1e-3, name


@pytest.mark.parametrize("count", [2, 48, 130])
def test_scores_of_a_text_are_those_of_transformers(tmp_path, make_engine, reference_logits, count):
    from llm_engine.scoring import scores

    model = small_model(**SHAPES["qwen3"])
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    engine = make_engine(tmp_path, kv_cache_bytes=1 << 24, step_token_budget=48)
    known = reference_logits(model, tokens)[:-1].log_softmax(dim=-1)
    expected = known.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
    found = scores(engine, tokens)
    log_probabilities = torch.tensor([score.log_probability for score in found])
    assert log_probabilities.shape == expected.shape
    assert (log_probabilities - expected).abs().max() < 1e-3
    likeliest = torch.tensor([score.likeliest_token_id for score in found])
    assert (known.max(dim=1).values - known.gather(1, likeliest.unsqueeze(1)).squeeze(1)).max() < 1e-3
    assert not engine.has_work


@pytest.mark.parametrize("cpu_kernels", [True, False], ids=["by kernels", "by torch"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("bf16", 0.03), ("bf16 products", 0.03), ("fp16", 0.003), ("int8", 0.03), ("w8a8", 0.05), ("w8a8 products", 0.05)],
)
@pytest.mark.parametrize("shape", ["grouped", "qwen2", "deepseek_v3"])
def test_narrow_weights_come_near_those_of_fp32(
    tmp_path, make_engine, prompt_logits, reference_logits, monkeypatch, shape, dtype, bound, cpu_kernels
):
    from llm_engine import rank as rank_module

    model = small_model(**{**SHAPES[shape], "initializer_range": 0.1})
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference_logits(model, tokens)
    # As on a processor with such products, and on one without.
    products = torch.bfloat16 if dtype.endswith("products") else torch.float32
    monkeypatch.setattr(rank_module, "compute_dtype", lambda dtype, device: products)
    engine = make_engine(tmp_path, dtype=dtype.split()[0], kv_cache_bytes=1 << 24, cpu_kernels=cpu_kernels)
    assert engine.model_info.compute_dtype == ("bf16" if dtype.endswith("products") else "fp32")
    difference = prompt_logits(engine, tokens) - expected
    # A rounded row may choose another expert, which is no small difference.
    bound *= 2 if shape == "deepseek_v3" else 1
    assert 0 < difference.abs().mean() < bound * expected.abs().mean()


@pytest.mark.parametrize("cpu_kernels", [True, False], ids=["by kernels", "by torch"])
@pytest.mark.parametrize("shape", ["grouped", "deepseek_v3, whole vectors"])
def test_answers_are_the_same_with_and_without_the_reuse_of_prefixes(tmp_path, make_engine, shape, cpu_kernels):
    from llm_engine import SamplingParams, SequenceRequest

    model = small_model(**SHAPES[shape], seed=2)
    model.save_pretrained(tmp_path)
    source = random.Random(1)
    beginnings = [[source.randrange(300) for _ in range(source.randint(20, 80))] for _ in range(4)]
    requests = [
        SequenceRequest(
            request_id=str(index),
            token_ids=[*source.choice(beginnings)[: source.randint(10, 80)], source.randrange(300)],
            max_tokens=source.randint(1, 12),
            sampling=SamplingParams(temperature=0.0, logprobs=1),
            ignore_eos=True,
            cache_salt=source.choice(["", "other"]),
            priority=source.randint(0, 2),
        )
        for index in range(120)
    ]
    answers, loads = [], []
    for reuses in (True, False):
        # So few blocks that some lose theirs.
        engine = make_engine(
            tmp_path, kv_cache_bytes=1 << 20, max_sequences=8, step_token_budget=32, prefix_reuse=reuses,
            cpu_kernels=cpu_kernels, block_token_count=4,
        )  # fmt: skip
        found = {}
        waiting = list(requests)
        while waiting or engine.has_work:
            while waiting and engine.load.running + engine.load.waiting < 12:
                engine.add(waiting.pop(0))
            for output in engine.step():
                tokens, logprobs = found.setdefault(output.request_id, ([], []))
                tokens += output.token_ids
                logprobs += output.logprobs
        answers.append(found)
        loads.append(engine.load)
    with_reuse, without = loads
    assert with_reuse.cached_token_total > 1000
    assert without.cached_token_total == 0
    assert with_reuse.prompt_token_total < 0.7 * without.prompt_token_total
    assert with_reuse.free_block_count == with_reuse.total_block_count
    for name, (tokens, logprobs) in answers[0].items():
        assert tokens == answers[1][name][0], name
        assert torch.tensor(logprobs).allclose(torch.tensor(answers[1][name][1]), atol=1e-4)


def test_a_second_turn_computes_what_is_new(tmp_path, make_engine):
    from llm_engine import SamplingParams, SequenceRequest

    small_model().save_pretrained(tmp_path)
    engine = make_engine(tmp_path, kv_cache_bytes=1 << 24)
    prompt = list(range(100))

    def turn(name: str) -> int:
        sampling = SamplingParams(temperature=0.0)
        engine.add(
            SequenceRequest(request_id=name, token_ids=prompt, max_tokens=30, sampling=sampling, ignore_eos=True)
        )
        reused = set()
        while engine.has_work:
            for output in engine.step():
                prompt.extend(output.token_ids)
                reused.add(output.cached_token_count)
        return reused.pop()

    assert turn("first") == 0
    prompt += [1, 2, 3]
    # 129 of the first turn's 130 tokens were computed: eight whole blocks of 16.
    assert turn("second") == 128
