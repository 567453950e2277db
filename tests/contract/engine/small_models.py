"""Small random models of every supported shape, as transformers builds them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
    "deepseek_v3, whole vectors": {
        "family": "DeepseekV3", **LATENT, **DEEPSEEK_EXPERTS, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
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


def save_spoiled_model(folder: Path) -> None:
    """A model as a folder, with a number that is none, which the last of several ranks reads."""
    small_model().save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 0] = torch.nan
    save_file(tensors, path)


def save_eight_bit_model(folder: Path, shape: str, size: int) -> None:
    """A model as a folder, whose projections are eight-bit floats with a scale for each `size` rows and columns."""
    small_model(**SHAPES[shape]).save_pretrained(folder)
    path, config_path = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(path)
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name]
        rows, columns = (torch.arange(length) // size for length in weight.shape)
        scales = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) * 0.01 + 0.005
        tensors[name] = (weight / scales[rows][:, columns]).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, path)
    fields = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [size, size]}
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "quantization_config": fields}))


def tokens_of(count: int) -> list[int]:
    """A prompt of so many tokens."""
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def decoded(engine, prompts: dict[str, list[int]], count: int) -> dict[str, tuple[list, list, list]]:
    """Of each prompt, so many greedy tokens, their log-probabilities, and those of the twenty likeliest."""
    from llm_engine import SamplingParams, SequenceRequest

    sampling = SamplingParams(temperature=0.0, logprobs=20)
    for name, prompt in prompts.items():
        engine.add(
            SequenceRequest(request_id=name, token_ids=prompt, max_tokens=count, sampling=sampling, ignore_eos=True)
        )
    answers = {name: ([], [], []) for name in prompts}
    while engine.has_work:
        for output in engine.step():
            for kept, new in zip(
                answers[output.request_id], (output.token_ids, output.logprobs, output.top_logprobs), strict=True
            ):
                kept.extend(new)
    assert all(len(tokens) == count for tokens, *_ in answers.values())
    return answers
