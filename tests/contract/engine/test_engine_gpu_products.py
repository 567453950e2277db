"""Whole models through the GPU's products, on a CPU by Triton's interpreter."""

import os

import pytest
from small_models import SHAPES, save_eight_bit_model, small_model, tokens_of

# Read when the kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

COUNT = 70


@pytest.fixture
def make_gpu_engine(make_engine, monkeypatch):
    """An engine that computes as if it were on a GPU."""
    from llm_engine import rank
    from llm_engine.gpu_products import GpuExperts

    def make(path):
        with monkeypatch.context() as patched:
            compute = rank.Compute
            fields = {"grouped_experts": GpuExperts, "kernels": None, "attention": None}
            patched.setattr(rank, "Compute", lambda **given: compute(**{**given, **fields}))
            load = rank.load_checkpoint
            patched.setattr(
                rank, "load_checkpoint", lambda *given, **named: load(*given, **{**named, "keeps_fp8": True})
            )
            return make_engine(path, kv_cache_bytes=1 << 24, step_token_budget=48)

    return make


@pytest.mark.parametrize("shape", ["qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_logits_of_mixtures_are_those_of_transformers(
    tmp_path, make_gpu_engine, prompt_logits, reference_logits, shape
):
    from llm_engine.gpu_products import GpuExperts

    model = small_model(**SHAPES[shape], seed=4)
    model.save_pretrained(tmp_path)
    engine = make_gpu_engine(tmp_path)
    assert any(isinstance(getattr(layer.mlp, "_routed", None), GpuExperts) for layer in engine._rank.model._layers)
    expected = reference_logits(model, tokens_of(COUNT))
    assert (prompt_logits(engine, tokens_of(COUNT)) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("shape", ["grouped", "deepseek_v3"])
def test_logits_of_eight_bit_floats_are_those_of_their_values(
    tmp_path, make_gpu_engine, make_engine, prompt_logits, shape
):
    save_eight_bit_model(tmp_path, shape, 16)
    kept = make_gpu_engine(tmp_path)
    assert kept._rank.model._layers[0].attention_output._floats8 is not None
    expected = prompt_logits(make_engine(tmp_path, kv_cache_bytes=1 << 24), tokens_of(COUNT))
    assert (prompt_logits(kept, tokens_of(COUNT)) - expected).abs().max() < 1e-4 * expected.abs().max()
