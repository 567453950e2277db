"""Mixtures of experts through the GPU's kernel, on a CPU by Triton's interpreter, against transformers."""

import os

import pytest
import torch
from small_models import SHAPES, small_model

# Read when the kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape in ("qwen3_moe", "deepseek_v2", "deepseek_v3")])
def test_logits_are_those_of_transformers(tmp_path, make_engine, prompt_logits, reference_logits, monkeypatch, shape):
    from llm_engine import rank as rank_module
    from llm_engine.gpu_experts import GpuExperts

    compute = rank_module.Compute
    monkeypatch.setattr(
        rank_module, "Compute", lambda **fields: compute(**{**fields, "grouped_experts": GpuExperts, "kernels": None})
    )
    model = small_model(**SHAPES[shape], seed=4)
    model.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, kv_cache_bytes=1 << 24, step_token_budget=48)
    assert any(isinstance(getattr(layer.mlp, "_routed", None), GpuExperts) for layer in engine._rank.model._layers)
    tokens = torch.randint(0, 300, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference_logits(model, tokens)
    assert (prompt_logits(engine, tokens) - expected).abs().max() < 1e-4 * expected.abs().max()
