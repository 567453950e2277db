"""The model `llm_sim`: `llm` with a simulated engine. The conversation is llm/1/triton_model.py's.

Triton starts each model in a process of its own with the model's own folders on the path, so those of `llm`, whose
modules are shared, are put there here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

_MODELS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_MODELS / name) for name in ("llm_sim", "llm/1", "llm")]

from engine_settings import setting_values  # noqa: E402, Triton does not know these folders
from engine_thread import Engine  # noqa: E402
from simulated_engine import SimulatedEngine  # noqa: E402
from simulation_config import SimulationConfig, with_preset  # noqa: E402
from triton_model import TritonModel  # noqa: E402


class TritonPythonModel(TritonModel):
    """Serves the engine that only takes time."""

    def load_engine(self, parameters: Mapping[str, str], environment: Mapping[str, str]) -> Engine:
        """Reads the vocabulary, nothing else."""
        return SimulatedEngine(with_preset(setting_values(SimulationConfig, parameters, environment)))
