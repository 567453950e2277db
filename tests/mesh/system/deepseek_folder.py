"""Writes a random small DeepSeek-V3 as a Hugging Face folder: `python deepseek_folder.py DIR`, where torch is.

Two layers, the second with a mixture of experts; the vocabulary is the bytes and two special tokens.
"""

import json
import sys
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[3] / "triton_models" / "llm"
SPECIAL = ("<|im_start|>", "<|im_end|>")
CONFIG = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 258, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 5,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_weights(folder: Path) -> None:
    """As large as lets the answer depend on every part of the model."""
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(ENGINE))
    from llm_engine.architecture import from_hugging_face
    from llm_engine.layouts import fused_tensors

    random = torch.Generator().manual_seed(0)
    tensors = {}
    for fused in fused_tensors(from_hugging_face(folder / "config.json", CONFIG, {}), tied=False):
        for part in fused.parts:
            scale = 1.0 if len(part.shape) == 1 else part.shape[-1] ** -0.5
            tensors[part.name] = torch.randn(part.shape, generator=random) * 1.5 * scale
    save_file(tensors, folder / "model.safetensors")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(target)
    write_weights(target)
