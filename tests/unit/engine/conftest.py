"""Tiny models on disk, as the engine's tests need them: made here, without transformers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ENGINE_PARENT = Path(__file__).resolve().parents[3] / "triton_models" / "llm"
sys.path[:0] = [str(ENGINE_PARENT), str(Path(__file__).parent)]

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 32, 48, 4, 2, 8, 2, 96


def config_fields() -> dict:
    """config.json of the tiny model."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }


def weight_tensors() -> dict[str, torch.Tensor]:
    """Random weights of the tiny model, under Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.3

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    return tensors


@pytest.fixture
def tiny_tensors() -> dict[str, torch.Tensor]:
    """The tiny model's weights."""
    return weight_tensors()


@pytest.fixture
def make_folder(tmp_path):
    """Write a Hugging Face folder; `fields` and `tensors` override, None takes out."""

    def make(fields: dict | None = None, tensors: dict | None = None) -> Path:
        folder = tmp_path / "tiny"
        folder.mkdir(exist_ok=True)
        both = [{**config_fields(), **(fields or {})}, {**weight_tensors(), **(tensors or {})}]
        kept = [{key: value for key, value in part.items() if value is not None} for part in both]
        (folder / "config.json").write_text(json.dumps(kept[0]))
        save_file(kept[1], folder / "model.safetensors")
        return folder

    return make


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_tensors() -> dict[str, np.ndarray]:
    """The tiny model's weights as llama.cpp's converter writes them: q and k rows interleaved."""
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    converted = {}
    for name, tensor in weight_tensors().items():
        stem = name.removesuffix(".weight")
        if stem in tops:
            converted[f"{tops[stem]}.weight"] = tensor.numpy()
            continue
        _, _, layer, part = stem.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = tensor.view(-1, 2, HEAD_DIM // 2, HIDDEN)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        converted[f"blk.{layer}.{_GGUF_NAMES[part]}.weight"] = tensor.numpy()
    return converted


@pytest.fixture
def make_gguf(tmp_path):
    """Write a GGUF file of the same model; `fields` and `tensors` override, None takes out; `words` have kinds.

    A tensor may be values with the kind in which they are written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    def make(
        fields: dict | None = None,
        tensors: dict | None = None,
        arch: str = "llama",
        words: list[tuple[str, int]] | None = None,
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = GGUFWriter(path, arch)
        integers = {
            "llama.block_count": LAYERS,
            "llama.context_length": 128,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": INTERMEDIATE,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.vocab_size": VOCABULARY,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.bos_token_id": 1,
        }
        floats = {"llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5}
        for key, value in ({**integers, **floats, **(fields or {})}).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif value is not None:
                writer.add_uint32(key, value)
        if words is not None:
            writer.add_array("tokenizer.ggml.token_type", [kind for _, kind in words])
        texts = [text for text, _ in words] if words else [f"t{index}" for index in range(VOCABULARY)]
        writer.add_array("tokenizer.ggml.tokens", texts)
        for name, array in ({**_gguf_tensors(), **(tensors or {})}).items():
            if isinstance(array, tuple):
                kind = GGMLQuantizationType[array[1]]
                writer.add_tensor(name, quantize(array[0], kind), raw_dtype=kind)
            elif array is not None:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.fixture
def lettered_path(make_gguf) -> Path:
    """The tiny model with a token for each letter."""
    from letters import LETTERS

    words = [(text, 3 if place < 3 else 1) for place, text in enumerate(LETTERS)]
    return make_gguf({"tokenizer.ggml.model": "gpt2"}, words=words)


@pytest.fixture
def lettered(lettered_path, make_engine):
    """An engine whose tokens are letters."""
    return lambda **settings: make_engine(lettered_path, **settings)


@pytest.fixture
def make_engine(make_folder):
    """An engine over the tiny model in fp32, with a small KV cache unless told otherwise."""
    from llm_engine import Engine, EngineConfig

    def make(model_path: Path | None = None, **settings) -> Engine:
        defaults = {
            "dtype": "fp32",
            "kv_cache_bytes": 512 * 1024,
            "block_token_count": 4,
            "step_token_budget": 16,
            "max_sequences": 8,
            "max_waiting": 8,
        }
        path = make_folder() if model_path is None else model_path
        return Engine(EngineConfig(model_path=str(path), **{**defaults, **settings}))

    return make
