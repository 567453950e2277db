"""The model `llm`: what Triton's Python backend looks for. The conversation is `triton_model.py`'s."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from engine_settings import engine_config
from engine_thread import Engine
from triton_model import TritonModel

import llm_engine


class TritonPythonModel(TritonModel):
    """Serves the engine that computes."""

    def load_engine(self, parameters: Mapping[str, str], environment: Mapping[str, str]) -> Engine:
        """Loads the weights, which takes seconds.

        On a thread that ends with it: OpenMP counts a thread's helpers for as long as it lives, and with more of them
        than processors those of the steps' thread would no longer spin, but sleep at each of some 300 barriers a step.
        """
        with ThreadPoolExecutor(1, "engine-loading") as loading:
            self._engine = loading.submit(llm_engine.Engine, engine_config(parameters, environment)).result()
        return self._engine

    def finalize(self) -> None:
        """Ends the other ranks too, and lets other hosts know."""
        super().finalize()
        self._engine.close()
