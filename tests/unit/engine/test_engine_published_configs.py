"""The config.json files that models were published with are understood, and what none of them says is refused."""

from pathlib import Path

import pytest

from llm_engine import ModelLoadError
from llm_engine.architecture import Architecture, from_hugging_face

PATH = Path("model/config.json")
ALL = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0", "use_cache": True, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    **ALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
    "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
LLAMA_8B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
QWEN = {**ALL, "rms_norm_eps": 1e-06, "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645}
QWEN2 = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
QWEN3 = {
    **QWEN, "attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
DEEPSEEK = {
    **ALL, "attention_bias": False, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840, "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_theta": 10000,
}  # fmt: skip
DEEPSEEK_ROPE = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
DEEPSEEK_V3 = {
    **DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "rope_scaling": {**DEEPSEEK_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

PUBLISHED = {
    "SmolLM2-135M-Instruct": {
        **LLAMA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "vocab_size": 49152,
    },
    "SmolLM2-135M-Instruct, saved by transformers 5 from its GGUF": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.02, "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 9.999999747378752e-06,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "tie_word_embeddings": True,
        "transformers_version": "5.23.0", "unk_token_id": 0, "use_cache": True, "vocab_size": 49152,
    },
    "Llama-3.1-8B-Instruct": {**LLAMA_8B, "rope_scaling": LLAMA3_ROPE},
    "Llama-3.2-1B-Instruct": {
        **LLAMA, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True,
    },
    "DeepSeek-R1-Distill-Llama-8B": {**LLAMA_8B, "eos_token_id": 128001, "rope_scaling": LLAMA3_ROPE},
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        **QWEN2, "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960,
        "max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12,
        "num_hidden_layers": 28, "num_key_value_heads": 2, "rope_theta": 10000, "sliding_window": 4096,
        "use_mrope": False,
    },
    "Qwen2-7B-Instruct": {
        **QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
        "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rope_theta": 1000000.0, "sliding_window": 131072, "vocab_size": 152064,
    },
    "Qwen2.5-0.5B-Instruct": {
        **QWEN2, "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        **QWEN3, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
        "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "Qwen3-30B-A3B": {
        **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
        "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "DeepSeek-V2-Lite": {
        **DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "bos_token_id": 100000,
        "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "q_lora_rank": None,
        "rope_scaling": {**DEEPSEEK_ROPE, "mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
    },
    "DeepSeek-V3": {**DEEPSEEK_V3, "quantization_config": FP8},
    "DeepSeek-V3, its weights as bf16": DEEPSEEK_V3,
}  # fmt: skip


def read(config: dict, generation: dict | None = None) -> Architecture:
    return from_hugging_face(PATH, config, generation or {})


def refusal(config: dict) -> str:
    with pytest.raises(ModelLoadError) as caught:
        read(config)
    assert str(PATH) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_understood(name):
    config = PUBLISHED[name]
    architecture = read(config)
    assert architecture.family == config["model_type"]
    assert architecture.layer_count == config["num_hidden_layers"]
    assert architecture.context_token_count == config["max_position_embeddings"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_field_that_nobody_knows_is_refused_by_name(name):
    assert "field attention_sink_size is 4" in refusal({**PUBLISHED[name], "attention_sink_size": 4})
    assert read({**PUBLISHED[name], "attention_sink_size": None})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 8}, ["num_experts", "8"]),
        ({"kv_lora_rank": 512}, ["kv_lora_rank"]),
        ({"use_mrope": True}, ["use_mrope", "True"]),
        ({"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'"]),
        ({"num_nextn_predict_layers": "1"}, ["num_nextn_predict_layers", "'1'"]),
        ({"num_nextn_predict_layers": 10**12}, ["num_nextn_predict_layers", "4096"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers", "4096"]),
        ({"vocab_size": 10**30}, ["vocab_size"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "inf"]),
        ({"rope_theta": float("nan")}, ["rope_theta", "nan"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor", "more than 0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, ["mscale", "1.0"]),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}}, ["mrope_section"]),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, ["low_freq_factor", "high_freq_factor"]),
        ({"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 0}}, ["original_max", "0"]),
        ({"rope_scaling": {**DEEPSEEK_ROPE, "factor": float("inf")}}, ["factor", "inf"]),
        ({"rope_scaling": {**DEEPSEEK_ROPE, "beta_fast": 0}}, ["beta_fast", "more than 0"]),
        ({"rope_scaling": {**DEEPSEEK_ROPE, "attention_factor": -1.0}}, ["attention_factor", "-1.0"]),
        ({"rope_scaling": DEEPSEEK_ROPE, "rope_theta": 1.0}, ["rope_theta", "1.0"]),
        ({"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default"}}, ["rope_scaling", "different"]),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(fields, words):
    message = refusal({**LLAMA_8B, **fields})
    assert [word for word in words if word not in message] == []


def test_sizes_of_a_latent_that_contradict_each_other_are_refused():
    assert read({**DEEPSEEK_V3, "head_dim": 64, "qk_head_dim": 192})
    assert "qk_head_dim" in refusal({**DEEPSEEK_V3, "qk_head_dim": 128})


def test_rope_fields_may_stand_in_both_places():
    newer = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    both = read({**LLAMA_8B, "rope_scaling": LLAMA3_ROPE, "rope_parameters": newer})
    assert both == read({**LLAMA_8B, "rope_scaling": LLAMA3_ROPE})


def test_ends_come_from_the_config_where_the_generation_config_names_none():
    assert read(LLAMA_8B, {"eos_token_id": None}).eos_token_ids == (128001, 128008, 128009)
    assert read(LLAMA_8B, {"eos_token_id": 7}).eos_token_ids == (7,)
