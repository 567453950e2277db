"""What all nodes of an engine must have alike, so that each computes its part of the same step.

Owns the comparison. What only the first node uses (how it batches, how much waits) and what is each host's own
(paths, threads) may differ. Invariant: what differs is refused by its name before anything is loaded.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from .config import EngineConfig
from .matmul import compute_dtype
from .weights import model_files

AGREED_SETTINGS = (
    "node_count",
    "tensor_parallel_size",
    "dtype",
    "device",
    "block_token_count",
    "kv_cache_bytes",
    "max_context_tokens",
    "attention_window",
    "attention_window_from",
    "attention_sinks",
    "collective_timeout_seconds",
)

SAMPLE_COUNT = 64
SAMPLE_BYTES = 4096
"""Of each file so many pieces of so many bytes are compared: a whole model would take minutes to read."""


def agreement(config: EngineConfig) -> dict[str, object]:
    """What a node has, by name."""
    # With a window the budget too says how many blocks a sequence needs, and so how long a context can be.
    settings = (*AGREED_SETTINGS, *(("step_token_budget",) if config.attention_window else ()))
    return {
        "engine version": _digest(engine_files()),
        "torch version": torch.__version__,
        "model files": _digest(model_files(Path(config.model_path))),
        "compute type": str(compute_dtype(config.dtype, torch.device(config.device))),
    } | {name: getattr(config, name) for name in settings}


def engine_files() -> list[Path]:
    """The engine's sources, the kernels' too."""
    return sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".c", ".h"))


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> str:
    """What another node has otherwise, in words; empty where nothing differs."""
    return "; ".join(
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} on node 0"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    )


def _digest(files: list[Path]) -> str:
    """Changes with the files' sizes, and with what is in samples of them; not with their names."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as file:
            for index in range(SAMPLE_COUNT):
                file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLE_COUNT - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
