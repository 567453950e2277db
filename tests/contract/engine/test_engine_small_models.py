"""Small random models of every supported shape, against transformers."""

import pytest
import torch

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
QWEN_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True, "head_dim": 16,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 6, "q_lora_rank": 40, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}  # fmt: skip
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip
SHAPES = {
    "grouped": {},
    "every head its own": {"num_key_value_heads": 6},
    "one kv head": {"num_key_value_heads": 1},
    "head_dim of its own": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "rope llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "rope yarn": {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
    "rope yarn, as DeepSeek writes it": {
        "rope_parameters": {
            **YARN,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "truncate": False,
        }
    },
    "qwen2": {"family": "Qwen2"},
    "qwen2, tied, yarn": {
        "family": "Qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": {**YARN, "original_max_position_embeddings": 512},
    },
    "qwen3": {"family": "Qwen3", "head_dim": 32},
    "qwen3, one kv head, tied": {
        "family": "Qwen3", "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "qwen3_moe": {"family": "Qwen3Moe", **QWEN_EXPERTS},
    "qwen3_moe, some layers dense, shares as they are": {
        "family": "Qwen3Moe", **QWEN_EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "norm_topk_prob": False,
    },
    "deepseek_v2": {"family": "DeepseekV2", **LATENT, **DEEPSEEK_EXPERTS, "topk_method": "greedy"},
    "deepseek_v2, groups, no query latent": {
        "family": "DeepseekV2", **LATENT, **DEEPSEEK_EXPERTS, "topk_method": "group_limited_greedy",
        "q_lora_rank": None, "routed_scaling_factor": 4.0,
    },
    "deepseek_v3": {"family": "DeepseekV3", **LATENT, **DEEPSEEK_EXPERTS},
    "deepseek_v3, yarn": {
        "family": "DeepseekV3", **LATENT, **DEEPSEEK_EXPERTS, "norm_topk_prob": False,
        "rope_parameters": {
            **YARN, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v3, rope by halves, all layers dense": {
        "family": "DeepseekV3", **LATENT, **DEEPSEEK_EXPERTS, "rope_interleave": False, "first_k_dense_replace": 3,
    },
}  # fmt: skip


def small_model(*, family: str = "Llama", seed: int = 0, **changes):
    import transformers

    fields = {
        "vocab_size": 300,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 7,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**fields, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                # They begin as zeros and ones, under which an engine that left them out would be right.
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shard", ["50GB", "300KB"], ids=["one file", "sharded"])
def test_logits_are_those_of_transformers(tmp_path, make_engine, prompt_logits, reference_logits, shape, shard):
    model = small_model(**SHAPES[shape], seed=int(shard != "50GB"))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard != "50GB")
    engine = make_engine(tmp_path, kv_cache_bytes=1 << 24, step_token_budget=48)
    assert engine.model_info.eos_token_ids == (7,)
    for count in (1, 5, 200):
        tokens = torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(count)).tolist()
        expected = reference_logits(model, tokens)
        difference = (prompt_logits(engine, tokens) - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max(), (shape, count)


@pytest.mark.parametrize("shape", ["grouped", "qwen2", "qwen3_moe", "deepseek_v2", "deepseek_v3, yarn"])
def test_decoding_together_gives_the_log_probabilities_of_transformers(tmp_path, make_engine, reference_logits, shape):
    from llm_engine import SamplingParams, SequenceRequest

    model = small_model(**SHAPES[shape], seed=2)
    model.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, kv_cache_bytes=1 << 24, step_token_budget=48)
    source = torch.Generator().manual_seed(3)
    prompts = {str(count): torch.randint(0, 300, (count,), generator=source).tolist() for count in (1, 9, 30, 60, 100)}
    answers = {name: ([], []) for name in prompts}
    for name, prompt in prompts.items():
        sampling = SamplingParams(temperature=0.0, logprobs=1)
        engine.add(
            SequenceRequest(request_id=name, token_ids=prompt, max_tokens=12, sampling=sampling, ignore_eos=True)
        )
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id][0].extend(output.token_ids)
            answers[output.request_id][1].extend(output.logprobs)
    for name, prompt in prompts.items():
        tokens, logprobs = answers[name]
        assert len(tokens) == 12
        expected = reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1].log_softmax(dim=-1)
        chosen = expected.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (chosen - torch.tensor(logprobs)).abs().max() < 1e-3, name
        assert (expected.max(dim=1).values - chosen).max() < 1e-3, name


def test_bf16_products_come_near_those_of_fp32(tmp_path, make_engine, prompt_logits, reference_logits, monkeypatch):
    from llm_engine import engine as engine_module

    model = small_model(initializer_range=0.1)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference_logits(model, tokens)
    kept_narrow = make_engine(tmp_path, dtype="bf16", kv_cache_bytes=1 << 24)
    monkeypatch.setattr(engine_module, "compute_dtype", lambda weight_dtype, device: weight_dtype)
    narrow = make_engine(tmp_path, dtype="bf16", kv_cache_bytes=1 << 24)
    assert narrow.model_info.compute_dtype == "bf16"
    for engine in (kept_narrow, narrow):
        difference = prompt_logits(engine, tokens) - expected
        assert 0 < difference.abs().mean() < 0.03 * expected.abs().mean()
