"""The engine and transformers over the same weights."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

# Before torch loads: waiting threads that spin slow each other tenfold on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[:0] = [str(Path(__file__).resolve().parents[3] / "triton_models" / "llm"), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """SmolLM2-135M-Instruct; without it these tests fail, since they would show nothing."""
    given = os.environ.get("TIDEGATE_TEST_GGUF")
    if not given or not Path(given).is_file():
        pytest.fail(f"TIDEGATE_TEST_GGUF is {given!r}, expected the path of SmolLM2's GGUF file")
    return Path(given)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Where the engines of this session keep their dequantised weights."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def reference(gguf_path):
    """transformers' own reading of the GGUF file, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def make_engine(cache_dir):
    """An engine in fp32 on two threads unless told otherwise."""
    from llm_engine import Engine, EngineConfig

    def make(model_path: Path, **settings) -> Engine:
        defaults = {"dtype": "fp32", "kv_cache_bytes": 1 << 28, "thread_count": 2, "cache_dir": str(cache_dir)}
        return Engine(EngineConfig(model_path=str(model_path), **{**defaults, **settings}))

    return make


@pytest.fixture(scope="session")
def engine(make_engine, gguf_path):
    """The real model in fp32."""
    return make_engine(gguf_path)


@pytest.fixture(scope="session")
def prompt_logits():
    """The engine's logits at a prompt's positions, all or the last ones: [count, vocabulary_size] fp32."""
    import torch

    from llm_engine import SequenceRequest
    from llm_engine.step_tensors import row_works

    def compute(engine, token_ids: list[int], last: int | None = None):
        first = 0 if last is None else max(0, len(token_ids) - last)
        engine.add(SequenceRequest(request_id="logits", token_ids=token_ids, max_tokens=1))
        parts = []
        while sum(map(len, parts)) < len(token_ids) - first:
            plan = engine._batcher.plan()
            step = engine._rank.lay_out(row_works(plan))
            wanted = (step.positions >= first).nonzero().flatten()
            parts.append(engine._rank.forward(dataclasses.replace(step, sample_rows=wanted)))
            engine._batcher.commit(plan)
        engine.cancel("logits")
        return torch.cat(parts)

    return compute


@pytest.fixture(scope="session")
def reference_logits():
    """transformers' logits at a prompt's positions, all or the last ones."""
    import torch

    def compute(model, token_ids: list[int], last: int | None = None):
        with torch.inference_mode():
            return model(torch.tensor([token_ids]), logits_to_keep=last or 0).logits[0].float()

    return compute
