"""`tidegate engine`: the engine alone, without Triton or a mesh, for comparing and debugging.

Texts become token ids here, by the same code as in the mesh; the engine runs in Triton's environment, where torch is,
and writes one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from tidegate.cli import config, talk
from tidegate.text.model_files import ModelFileError, TextModel, load_text_model

ENGINE_FOLDER: Final = config.REPOSITORY / "triton_models" / "llm"

WINDOW_TOKENS: Final = 1024
"""A text is scored in pieces of so many tokens, or of the context where that is shorter."""


class EngineFailed(Exception):
    """The engine could not do it; it has said why on stderr."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which engine, and how it runs."""

    model: str
    """A GGUF file or a Hugging Face folder; empty: the model that comes with Tidegate."""
    dtype: str
    device: str
    threads: int
    ranks: int
    node_count: int | None = None
    node_rank: int | None = None
    master_address: str | None = None
    master_port: int | None = None
    """Several hosts, and where they meet; for what is not given, the engine looks for torchrun's variables."""

    @property
    def model_path(self) -> str:
        """The file or folder."""
        return self.model or config.default_model_path()


def generate(options: Options, prompt: str, *, max_tokens: int, temperature: float, seed: int | None) -> int:
    """Prints what the model continues a text with."""
    text = _text_model(options)
    token_ids = text.tokenizer.encode(prompt, allow_special=True)
    if not token_ids:
        talk.fail("the prompt is empty")
        return talk.EXIT_USAGE
    sampling = ["--temperature", str(temperature), *(["--seed", str(seed)] if seed is not None else [])]
    # Not as an argument: Linux takes no single one of more than 128 KiB.
    given = ["--token-ids", "-", "--tokens", str(max_tokens), *sampling]
    answer = _run(options, "generate", given, stdin=",".join(map(str, token_ids)))
    print(text.tokenizer.decode(answer["token_ids"]))
    return 0


def bench(options: Options, *, sequences: int, tokens: int, prompt_tokens: int, output: str) -> int:
    """Prints tokens per second."""
    counts = {"sequences": sequences, "tokens": tokens, "prompt-tokens": prompt_tokens, "max-sequences": sequences}
    given = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    _show(_run(options, "bench", [*given, "--step-token-budget", str(max(128, sequences))]), output)
    return 0


def perplexity(options: Options, file: Path, output: str) -> int:
    """Prints the perplexity of a file of text."""
    text = _text_model(options)
    try:
        token_ids = text.tokenizer.encode(file.read_text(encoding="utf-8"), allow_special=False)
    except (OSError, UnicodeDecodeError) as error:
        talk.fail(f"{file}: {error}")
        return talk.EXIT_USAGE
    if len(token_ids) < 2:
        talk.fail(f"{file}: {len(token_ids)} tokens, and nothing follows the first")
        return talk.EXIT_USAGE
    window = min(WINDOW_TOKENS, text.context_token_count - 1)
    pieces = [token_ids[first : first + window] for first in range(0, len(token_ids), window)]
    scored = json.dumps([piece for piece in pieces if len(piece) > 1])
    _show(_run(options, "perplexity", ["--prompts", "/dev/stdin"], stdin=scored), output)
    return 0


def join(options: Options, given: Sequence[str]) -> NoReturn:
    """Becomes a node of an engine on another host."""
    command, environment = _command(options, "join", given)
    os.execve(command[0], command, environment)


def _text_model(options: Options) -> TextModel:
    try:
        return load_text_model(options.model_path, "engine")
    except ModelFileError as error:
        talk.fail(str(error))
        raise EngineFailed from error


def _run(options: Options, command: str, given: Sequence[str], stdin: str = "") -> dict[str, Any]:
    words, environment = _command(options, command, [*given, "--json"])
    done = subprocess.run(words, env=environment, input=stdin, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EngineFailed
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _command(options: Options, command: str, given: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What starts the engine, and its environment."""
    settings = config.load()
    python = Path(settings.triton_python)
    if not python.exists():
        talk.fail(f"{python} is not there: `make setup` builds the environment")
        raise EngineFailed
    how = {
        "model": options.model_path, "cache-dir": config.home() / "cache", "dtype": options.dtype,
        "device": options.device, "threads": options.threads, "tensor-parallel-size": options.ranks,
        "node-count": options.node_count, "node-rank": options.node_rank,
        "master-address": options.master_address, "master-port": options.master_port,
    }  # fmt: skip
    flags = [word for name, value in how.items() if value is not None for word in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(python), "-m", "llm_engine", command, *flags, *given]
    return words, environment | {"PYTHONPATH": str(ENGINE_FOLDER)}


def _show(result: dict[str, Any], output: str) -> None:
    if output == "json":
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name.ljust(width)}  {value}")
