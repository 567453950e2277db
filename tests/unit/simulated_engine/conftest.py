"""The simulated engine's modules as Triton finds them, a tiny model folder, and time that the test plays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[3] / "triton_models"
sys.path[:0] = [str(MODELS / name) for name in ("llm_sim", "llm/1", "llm")]

from simulated_engine import SimulatedEngine  # noqa: E402, Triton's folders are on the path only now
from simulation_config import with_preset  # noqa: E402

from llm_engine import SamplingParams, SequenceOutput, SequenceRequest  # noqa: E402

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
TOKENS = ["<pad>", "<s>", "</s>", "a", "Ġ", "Ġx", "ĠTide", *(f"Ġ{chr(97 + i)}ide" for i in range(26))]

SETTINGS = {
    "sim_preset": "h200-70b",
    "base_step_seconds": 0.020,
    "seconds_per_sequence": 0.001,
    "seconds_per_prefill_token": 0.0001,
    "max_sequences": 4,
    "max_waiting": 4,
    "kv_block_count": 64,
    "block_token_count": 4,
    "step_token_budget": 32,
}


class FakeTime:
    """A clock that moves only when somebody sleeps, and then a little more than asked for."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lateness = 0.003
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds + self.lateness


def make_request(name: str = "a", tokens=(5, 6, 7), **fields) -> SequenceRequest:
    return SequenceRequest(**{"request_id": name, "token_ids": list(tokens), "max_tokens": 6, **fields})


def run_to_end(engine: SimulatedEngine) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """config.json and tokenizer.json of a model without weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    vocabulary = {text: token_id for token_id, text in enumerate(TOKENS)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return tmp_path


@pytest.fixture
def fake_time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def make_engine(model_folder, fake_time):
    def make(**settings) -> SimulatedEngine:
        config = with_preset({**SETTINGS, "model_path": str(model_folder), **settings})
        return SimulatedEngine(config, clock=fake_time.clock, sleep=fake_time.sleep)

    return make


@pytest.fixture
def request_of():
    return make_request


@pytest.fixture
def finish():
    return run_to_end


@pytest.fixture
def with_logprobs():
    return lambda count: SamplingParams(logprobs=count)
