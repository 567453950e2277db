"""The model `llm`: what Triton's Python backend looks for. The conversation is `triton_model.py`'s."""

from __future__ import annotations

from collections.abc import Mapping

from engine_settings import engine_config
from engine_thread import Engine
from triton_model import TritonModel

import llm_engine


class TritonPythonModel(TritonModel):
    """Serves the engine that computes."""

    def load_engine(self, parameters: Mapping[str, str], environment: Mapping[str, str]) -> Engine:
        """Loads the weights, which takes seconds."""
        self._engine = llm_engine.Engine(engine_config(parameters, environment))
        return self._engine

    def finalize(self) -> None:
        """Ends the other ranks too, and lets other hosts know."""
        super().finalize()
        self._engine.close()
