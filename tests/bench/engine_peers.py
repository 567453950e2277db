"""The engines that ours is measured against, each in an environment of its own.

A peer that is not installed is told with the command that installs it, and nothing fails for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine_runs import CACHE_FOLDER, DRIVERS, REPOSITORY, Case, RunFailed, flags, run

REFERENCE_ENVIRONMENT: Final = REPOSITORY / ".venv-reference"


@dataclass(frozen=True)
class Peer:
    """One engine: its name is its environment's folder."""

    name: str
    driver: str
    install: str
    """What follows `pip install`."""
    reads_gguf: bool

    def python(self, peers: Path | None) -> Path | None:
        """Its interpreter; None where it is not installed."""
        folders = [peers / self.name] if peers is not None else []
        if self.name == "transformers":
            folders.append(REFERENCE_ENVIRONMENT)
        found = (folder / "bin" / "python" for folder in folders)
        return next((python for python in found if python.exists()), None)

    def not_installed(self, peers: Path | None) -> str:
        """What to say where it is not installed."""
        folder = f"{peers or 'DIR'}/{self.name}"
        ending = "" if peers is not None else ", then --peers DIR"
        install = f"python3 -m venv {folder} && {folder}/bin/pip install {self.install}"
        return f"{self.name}: not installed; `{install}`{ending}"


LLAMA_CPP: Final = Peer("llama.cpp", "llama_cpp_server.py", "xllamacpp", reads_gguf=True)
NATIVE_LLAMA_CPP: Final = Peer(
    "llama.cpp-native", "llama_cpp_native.py", "--no-binary llama-cpp-python llama-cpp-python", reads_gguf=True
)
"""The same built for the machine, which the package of its server is not: here to compare with, without a bound."""

TRANSFORMERS: Final = Peer(
    "transformers", "transformers_batching.py", "torch transformers accelerate gguf", reads_gguf=False
)
BATCHING_PEERS: Final = (
    Peer("openvino", "openvino_batching.py", "openvino-genai", reads_gguf=True),
    Peer("vllm", "vllm_steps.py", "--no-deps -r tests/bench/drivers/vllm.txt", reads_gguf=False),
    TRANSFORMERS,
)
"""Those that run many sequences in one batch."""


def peer_dtype() -> str:
    """The type for peers that have a choice: bf16 where the processor multiplies it."""
    return "bf16" if " avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "fp32"


def peer_bench(
    peer: Peer, python: Path, case: Case, prompts: Path, *, model: str, folder: Path, threads: int
) -> dict[str, Any]:
    """One case on a peer; RunFailed where it does not run.

    Args:
        folder: where a Hugging Face folder of the model is, or is put.
    """
    dtype = peer_dtype()
    settings: dict[str, object] = {"prompts": prompts, "tokens": case.tokens, "threads": threads, "dtype": dtype}
    settings["model"] = model if peer.reads_gguf else hugging_face_folder(model, folder, dtype)
    command = [str(python.absolute()), str(DRIVERS / peer.driver), *flags(settings)]
    return run(command, f"{case.name}, {peer.name}")


def hugging_face_folder(model: str, folder: Path, dtype: str) -> Path:
    """The model's weights as a Hugging Face folder, written by transformers once."""
    target = folder / f"{Path(model).stem}-{dtype}"
    if not (target / "config.json").exists():
        python = REFERENCE_ENVIRONMENT / "bin" / "python"
        if not python.exists():
            raise RunFailed("the model's Hugging Face folder is made in .venv-reference: make setup-tests")
        os.makedirs(folder, exist_ok=True)
        run(
            [str(python), str(DRIVERS / "hugging_face_folder.py"), model, str(target), dtype],
            f"writing {target.name} for engines that read no GGUF",
        )
    return target


PEER_MODELS: Final = CACHE_FOLDER / "peer-models"
