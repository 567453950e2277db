"""The LLM engine: continuous batching over a paged KV cache, in plain torch.

It imports neither grpc nor Triton, so that it runs in Triton's Python backend, in a test and on the
command line alike. Reading order: `engine.py`, `batcher.py`, `block_pool.py`, `step_tensors.py`,
`model.py`, `kv_cache.py`, `sampler.py`, `weights.py`.
"""

import os
from typing import TYPE_CHECKING

from .config import EngineConfig
from .errors import EngineBroken, EngineError, ModelLoadError, RequestRefused
from .request import EngineLoad, ModelInfo, SamplingParams, SequenceOutput, SequenceRequest

if TYPE_CHECKING:
    from .engine import Engine

__all__ = [
    "Engine",
    "EngineBroken",
    "EngineConfig",
    "EngineError",
    "EngineLoad",
    "ModelInfo",
    "ModelLoadError",
    "RequestRefused",
    "SamplingParams",
    "SequenceOutput",
    "SequenceRequest",
]


def __getattr__(name: str) -> type:
    """Import the engine, and torch with it, only when it is asked for: a simulator needs neither."""
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Read once, when torch loads. Threads that spin for long while they wait take the processor from everything else on
    # it: with one busy neighbour on two cores a step took ten times as long. Threads that sleep at once are woken 180
    # times a step, which doubles a step of one sequence. So they spin for about a tenth of a millisecond.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    from .engine import Engine

    return Engine
