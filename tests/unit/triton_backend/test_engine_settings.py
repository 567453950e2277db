"""The engine's settings from config.pbtxt and the environment."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from engine_settings import DEFAULT_STREAM_INTERVAL_SECONDS, engine_config, stream_interval

from llm_engine import EngineConfig

CONFIG = Path(__file__).resolve().parents[3] / "triton_models" / "llm" / "config.pbtxt"


def test_the_environment_wins_over_the_parameters():
    parameters = {"model_path": "a.gguf", "max_sequences": "4", "thread_count": "3"}
    config = engine_config(parameters, {"TIDEGATE_ENGINE_MAX_SEQUENCES": "5", "HOME": "/"})
    assert (config.model_path, config.max_sequences, config.thread_count) == ("a.gguf", 5, 3)


def test_torchruns_variables_say_what_nothing_else_does():
    environment = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NNODES": "2", "RANK": "7"}
    parameters = {"model_path": "a.gguf", "tensor_parallel_size": "4", "master_address": "10.0.0.2"}
    config = engine_config(parameters, environment | {"TIDEGATE_ENGINE_MASTER_PORT": "29600"})
    assert (config.node_count, config.node_rank, config.own_ranks) == (2, 0, range(2))
    assert (config.master_address, config.master_port) == ("10.0.0.2", 29600)


def test_an_empty_parameter_is_the_engines_default():
    plain = engine_config({"model_path": "a.gguf"}, {})
    assert engine_config({"model_path": "a.gguf", "max_waiting": "", "dtype": " "}, {}) == plain


def test_every_fault_is_named_at_once():
    environment = {"TIDEGATE_ENGINE_MAX_SEQUENZES": "4", "TIDEGATE_ENGINE_KV_CACHE_BYTES": "1GB"}
    with pytest.raises(ValueError) as caught:
        engine_config({"colour": "blue"}, environment)
    said = str(caught.value)
    for words in (
        "parameter colour: the engine has no such setting",
        "TIDEGATE_ENGINE_MAX_SEQUENZES: the engine has no such setting",
        "TIDEGATE_ENGINE_KV_CACHE_BYTES is '1GB', expected int",
        "TIDEGATE_ENGINE_MODEL_PATH is not set",
    ):
        assert words in said


def test_a_value_out_of_bounds_is_the_engines_to_refuse():
    with pytest.raises(ValueError, match="max_sequences is 0"):
        engine_config({"model_path": "a.gguf", "max_sequences": "0"}, {})


def test_the_shipped_parameters_are_all_settings_that_the_engine_has_and_leave_them_as_they_are():
    names = re.findall(r'key: "(\w+)"', CONFIG.read_text())
    assert sorted(names) == sorted(
        ["stream_interval_seconds", *(field.name for field in dataclasses.fields(EngineConfig))]
    )
    shipped = dict.fromkeys(names, "")
    for environment in ({}, {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}):
        given = {"model_path": "a.gguf", "tensor_parallel_size": "2"}
        assert engine_config(shipped | given, environment) == engine_config(given, environment)


@pytest.mark.parametrize(
    ("parameter", "variable", "seconds"),
    [("", "", DEFAULT_STREAM_INTERVAL_SECONDS), ("0.2", " ", 0.2), ("0.2", "0", 0.0)],
)
def test_for_how_long_outputs_gather_is_no_setting_of_the_engine(parameter, variable, seconds):
    parameters = {"model_path": "a.gguf", "stream_interval_seconds": parameter}
    environment = {"TIDEGATE_ENGINE_STREAM_INTERVAL_SECONDS": variable}
    assert stream_interval(parameters, environment) == seconds
    assert engine_config(parameters, environment) == engine_config({"model_path": "a.gguf"}, {})


@pytest.mark.parametrize("text", ["soon", "-0.1", "1.5", "nan"])
def test_outputs_that_gather_for_ever_are_refused(text):
    with pytest.raises(ValueError, match=f"STREAM_INTERVAL_SECONDS is '{text}', expected"):
        stream_interval({}, {"TIDEGATE_ENGINE_STREAM_INTERVAL_SECONDS": text})
