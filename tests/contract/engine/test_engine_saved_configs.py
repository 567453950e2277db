"""Whatever transformers saves of a supported family is understood, its own defaults included."""

from pathlib import Path

import pytest
import transformers

from llm_engine.architecture import from_hugging_face

FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {},
    "DeepseekV2": {"num_experts_per_tok": 6},
    "DeepseekV3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_understood(family):
    config = getattr(transformers, f"{family}Config")(architectures=[f"{family}ForCausalLM"], **FAMILIES[family])
    for saved in (config.to_dict(), config.to_diff_dict()):
        assert from_hugging_face(Path("config.json"), saved, {}).family == config.model_type
