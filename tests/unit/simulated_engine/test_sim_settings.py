"""The simulated engine's settings and presets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from engine_settings import setting_values
from service_time import PRESETS
from simulation_config import SimulationConfig, with_preset

MODELS = Path(__file__).resolve().parents[3] / "triton_models"


def settings(**environment: str) -> SimulationConfig:
    given = {f"TIDEGATE_ENGINE_{name.upper()}": text for name, text in environment.items()}
    return with_preset(setting_values(SimulationConfig, {"model_path": "a.gguf"}, given))


def test_a_given_value_wins_over_the_preset():
    config = settings(sim_preset="h200-8b", base_step_seconds="0.5")
    assert config.base_step_seconds == 0.5
    assert config.seconds_per_sequence == PRESETS["h200-8b"]["seconds_per_sequence"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    assert settings(sim_preset=name).service_time.step_seconds(32, 0) > 0


def test_more_sequences_get_the_tokens_that_they_need_a_step():
    assert settings(sim_preset="smollm2-cpu", max_sequences="300").step_token_budget == 300


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sim_preset": "h100"}, "sim_preset is 'h100', expected one of h200-8b"),
        ({"base_step_seconds": "0"}, "base_step_seconds is 0.0, expected 0.0001 to 60"),
        ({"base_step_seconds": "nan"}, "base_step_seconds is nan"),
        ({"seconds_per_sequence": "-1"}, "seconds_per_sequence is -1.0"),
        ({"kv_block_count": "0"}, "kv_block_count is 0"),
        ({"step_stretch": "0.5"}, "step_stretch is 0.5, expected 0 (no bound), or more than 1"),
        ({"step_token_budget": "8"}, "step_token_budget is 8, expected at least max_sequences (32)"),
        ({"max_sequences": "x"}, "TIDEGATE_ENGINE_MAX_SEQUENCES is 'x', expected int"),
        ({"kv_cache_bytes": "1"}, "TIDEGATE_ENGINE_KV_CACHE_BYTES: the engine has no such setting"),
    ],
)
def test_a_bad_setting_is_refused_by_name(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        settings(**given)


def test_config_pbtxt_names_every_setting_and_the_tensors_of_llm():
    ours, theirs = ((MODELS / name / "config.pbtxt").read_text() for name in ("llm_sim", "llm"))
    keys = set(re.findall(r'key: "(\w+)"', ours))
    assert keys == {"stream_interval_seconds", *SimulationConfig.__dataclass_fields__}
    tensor = re.compile(r'name: "\w+".*')
    assert tensor.findall(ours) == tensor.findall(theirs)
