"""`python -m llm_engine generate|bench|perplexity|join`: drives the engine in its own process, without a server.

`generate` continues one prompt of token ids. `bench` measures tokens per second of the engine alone,
so that the cost of everything around it can be told by comparison. `perplexity` tells how likely the model
holds given texts, for comparing types and attentions. `join` has no engine: it computes for one on another host, which
may be one of Triton's, until that ends. Results go to stdout, one JSON object with `--json`;
talk goes to stderr. `tidegate engine` does the same with texts instead of token ids.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import get_args

from . import Engine, EngineConfig, EngineError, SamplingParams, SequenceRequest


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 is success, 1 a failure, 2 a wrong call."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "join":
            return _join(_config(options))
        started = time.perf_counter()
        engine = Engine(_config(options))
        try:
            result = {"load_seconds": round(time.perf_counter() - started, 3)}
            result |= _COMMANDS[options.command](engine, options)
        finally:
            engine.close()
    except (EngineError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    return 0


# Of this command, where they are not the engine's own.
_DEFAULTS: dict[str, object] = {
    "thread_count": 2,
    "prefix_reuse": False,
    "speculation_tokens": 0,
    "max_waiting": 1_000_000,
}

# Other names of flags, and of hosts and how they meet those of torchrun's environment.
_OTHER_NAMES = {
    "model_path": ("--model", ""),
    "thread_count": ("--threads", ""),
    "node_count": ("--nnodes", "NNODES"),
    "node_rank": ("--node_rank", "NODE_RANK"),
    "master_address": ("--master_addr", "MASTER_ADDR"),
    "master_port": ("--master_port", "MASTER_PORT"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm_engine")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue one prompt of token ids")
    generate.add_argument("--token-ids", required=True, help="1,4093,198 for example; - for standard input")
    generate.add_argument("--tokens", type=int, default=64, help="output tokens at most")
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--logprobs", type=int)
    bench = commands.add_parser("bench", help="measure tokens per second")
    bench.add_argument("--sequences", type=int, default=32)
    bench.add_argument("--tokens", type=int, default=128, help="output tokens of each sequence")
    bench.add_argument("--prompt-tokens", type=int, default=64, help="length of the random prompts")
    bench.add_argument("--prompts", type=Path, help="JSON file: a list of lists of token ids, used in turn")
    bench.add_argument("--temperature", type=float, default=0.0)
    perplexity = commands.add_parser("perplexity", help="how likely the model holds texts")
    perplexity.add_argument("--prompts", type=Path, required=True, help="JSON file: a list of lists of token ids")
    join = commands.add_parser("join", help="compute with an engine on another host, until it ends")
    for command in (generate, bench, perplexity, join):
        for setting in fields(EngineConfig):
            _add_flag(command, setting)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _add_flag(command: argparse.ArgumentParser, setting: Field[object]) -> None:
    """A setting of the engine, which `EngineConfig` explains."""
    other, variable = _OTHER_NAMES.get(setting.name, ("", ""))
    names = [f"--{setting.name.replace('_', '-')}", *filter(None, [other])]
    default = os.environ.get(variable) or _DEFAULTS.get(setting.name, setting.default)
    if setting.type is bool:
        command.add_argument(*names, action=argparse.BooleanOptionalAction, default=default)
        return
    kind = (get_args(setting.type) or (setting.type,))[0]
    said = "a GGUF file or a Hugging Face folder" if default is MISSING else f"default {default}"
    said += f"; or {variable}" if variable else ""
    command.add_argument(*names, type=kind, default=default, required=default is MISSING, help=said)


def _config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(**{setting.name: getattr(options, setting.name) for setting in fields(EngineConfig)})


def _join(config: EngineConfig) -> int:
    # Only here, since torch's distributed part takes its time to load.
    from .joined_node import serve_node

    serve_node(config)
    return 0


def _generate(engine: Engine, options: argparse.Namespace) -> dict[str, object]:
    sampling = SamplingParams(temperature=options.temperature, seed=options.seed, logprobs=options.logprobs)
    words = sys.stdin.read() if options.token_ids == "-" else options.token_ids
    try:
        prompt = [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"--token-ids is {words.strip()[:60]!r}, expected whole numbers with commas between") from None
    engine.add(SequenceRequest(request_id="0", token_ids=prompt, max_tokens=options.tokens, sampling=sampling))
    result: dict[str, object] = {"token_ids": [], "logprobs": [], "finish_reason": ""}
    while engine.has_work:
        for output in engine.step():
            result["token_ids"] += output.token_ids
            result["logprobs"] += output.logprobs or []
            result["finish_reason"] = output.finish_reason
            if output.finish_reason == "error":
                raise EngineError(output.error_message)
    return result


def _bench(engine: Engine, options: argparse.Namespace) -> dict[str, object]:
    """Run all sequences from one moment on.

    Processor seconds are those of all threads: where others use the machine too, they tell more than
    the clock. Decode is measured over the steps in which every sequence runs and none has a prompt left; where
    more sequences are asked for than run at once, there may be none, and the figure is null.
    """
    if options.sequences < 1:
        raise ValueError(f"--sequences is {options.sequences}, expected at least 1")
    prompts = _prompts(engine, options)
    sampling = SamplingParams(temperature=options.temperature, seed=0)
    _run(engine, [prompts[0]], 4, sampling)
    started, cpu_started = time.perf_counter(), time.process_time()
    steps = _run(engine, prompts, options.tokens, sampling)
    wall_seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    generated = sum(sum(counts) for _, counts, _ in steps)
    first_tokens = sorted(moment - started for _, _, moments in steps for moment in moments)
    full = [(seconds, sum(counts)) for seconds, counts, moments in steps if len(counts) == len(prompts) and not moments]
    decode_seconds = sum(seconds for seconds, _ in full)
    return {
        "sequences": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": generated,
        "wall_seconds": round(wall_seconds, 4),
        "cpu_seconds": round(cpu_seconds, 4),
        "tokens_per_second": round(generated / wall_seconds, 2),
        "first_token_seconds_median": round(first_tokens[len(first_tokens) // 2], 4),
        "first_token_seconds_last": round(first_tokens[-1], 4),
        "prompt_tokens_per_second": round(sum(map(len, prompts)) / first_tokens[-1], 2),
        "decode_step_count": len(full),
        "decode_seconds": round(decode_seconds, 4),
        "decode_tokens_per_second": round(sum(count for _, count in full) / decode_seconds, 2) if full else None,
        "drafted_tokens": engine.load.drafted_token_total,
        "accepted_tokens": engine.load.accepted_token_total,
        "preemptions": engine.load.preemption_count,
        "weight_dtype": engine.model_info.weight_dtype,
        "compute_dtype": engine.model_info.compute_dtype,
        "cache_dtype": engine.model_info.cache_dtype,
        "threads": options.thread_count,
    }


def _perplexity(engine: Engine, options: argparse.Namespace) -> dict[str, object]:
    """The exponential of the mean of what each token but a text's first costs, in natural logarithms."""
    from .scoring import log_probabilities

    started = time.perf_counter()
    found = [value for prompt in _given(options.prompts) for value in log_probabilities(engine, prompt)]
    if not found:
        raise ValueError(f"{options.prompts}: no text has two tokens")
    return {
        "perplexity": round(math.exp(-sum(found) / len(found)), 4),
        "tokens": len(found),
        "tokens_per_second": round(len(found) / (time.perf_counter() - started), 2),
        "weight_dtype": engine.model_info.weight_dtype,
        "compute_dtype": engine.model_info.compute_dtype,
        "cache_dtype": engine.model_info.cache_dtype,
    }


def _given(path: Path) -> list[list[int]]:
    given = json.loads(path.read_text())
    if not isinstance(given, list) or not given:
        raise ValueError(f"{path}: expected a list of lists of token ids")
    return given


_COMMANDS = {"generate": _generate, "bench": _bench, "perplexity": _perplexity}


def _prompts(engine: Engine, options: argparse.Namespace) -> list[list[int]]:
    if options.prompts is not None:
        given = _given(options.prompts)
        return [given[index % len(given)] for index in range(options.sequences)]
    source = random.Random(0)
    words = range(engine.model_info.vocabulary_size)
    return [source.choices(words, k=options.prompt_tokens) for _ in range(options.sequences)]


def _run(
    engine: Engine, prompts: list[list[int]], tokens: int, sampling: SamplingParams
) -> list[tuple[float, list[int], list[float]]]:
    """Each step's seconds, how many tokens it gave each sequence, and the moments of the first tokens among them."""
    for index, prompt in enumerate(prompts):
        engine.add(
            SequenceRequest(
                request_id=str(index), token_ids=prompt, max_tokens=tokens, sampling=sampling, ignore_eos=True
            )
        )
    steps, begun = [], set()
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        ended = time.perf_counter()
        new = {output.request_id for output in outputs} - begun
        begun |= new
        steps.append((ended - started, [len(output.token_ids) for output in outputs], [ended] * len(new)))
    return steps


if __name__ == "__main__":
    sys.exit(main())
