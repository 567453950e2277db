"""Runs of one engine in a process of its own, ours or a peer's: one case in, one line of JSON out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
DRIVERS: Final = Path(__file__).resolve().parent / "drivers"
ENGINE_FOLDER: Final = REPOSITORY / "triton_models" / "llm"
CACHE_FOLDER: Final = REPOSITORY / ".tidegate" / "cache"
RUN_SECONDS: Final = 900.0
"""The bound on one run, loading included."""

ERROR_CHARACTERS: Final = 300


class RunFailed(Exception):
    """A run ended without a result; the message is the last of what it said."""


@dataclass(frozen=True)
class Case:
    """What all engines are given alike: how many sequences, of which prompts, and how many tokens each."""

    name: str
    sequences: int
    prompt_tokens: int
    tokens: int
    figure: str
    """The key of the result that counts."""
    settings: dict[str, int] = field(default_factory=dict)
    """Flags of our own engine."""

    def prompts_file(self, folder: Path) -> Path:
        """The prompts as token ids, a different one a sequence, so that nothing can be reused."""
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps([prompt(seed, self.prompt_tokens) for seed in range(self.sequences)]))
        return path


def prompt(seed: int, token_count: int) -> list[int]:
    """Plain tokens of SmolLM2's vocabulary."""
    return [1000 + (seed * 7919 + place * 104729) % 40000 for place in range(token_count)]


def triton_python() -> str:
    """The interpreter of Triton's environment."""
    return os.environ.get("TIDEGATE_TRITON_PYTHON", str(REPOSITORY / ".venv-triton" / "bin" / "python"))


def own_bench(case: Case, prompts: Path, *, model: str, dtype: str, threads: int) -> dict[str, Any]:
    """Our engine's own benchmark, alone in its process."""
    settings: dict[str, object] = {
        "model": model, "cache-dir": CACHE_FOLDER, "dtype": dtype, "threads": threads, "prompts": prompts,
        "sequences": case.sequences, "tokens": case.tokens, **case.settings,
    }  # fmt: skip
    return run(
        [triton_python(), "-m", "llm_engine", "bench", "--json", *flags(settings)], f"{case.name}, ours, {dtype}"
    )


def own_inside(what: str, *, model: str, dtype: str, threads: int, **settings: object) -> dict[str, Any]:
    """One of the measures of `drivers/inside_engine.py`."""
    given = {"model": model, "cache-dir": CACHE_FOLDER, "dtype": dtype, "threads": threads, **settings}
    command = [triton_python(), str(DRIVERS / "inside_engine.py"), what, *flags(given)]
    return run(command, f"{what}, ours, {dtype}")


def flags(settings: dict[str, Any]) -> list[str]:
    """`--name value` of each."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run(command: list[str], name: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
    """Runs a command to its end, and reads the last line that it wrote.

    Args:
        seconds: the bound on it.

    Raises:
        RunFailed: it failed, wrote no result, or did not end in time.
    """
    print(f"  {name}", end="", file=sys.stderr, flush=True)
    started = time.monotonic()
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command,
            env=environment | {"PYTHONPATH": str(ENGINE_FOLDER)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(file=sys.stderr)
        raise RunFailed(str(error)[:ERROR_CHARACTERS]) from error
    print(f" ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunFailed(words[-1][-ERROR_CHARACTERS:])
    if not lines:
        raise RunFailed("it wrote no result")
    result: dict[str, Any] = json.loads(lines[-1])
    return result
