"""Looks at our engine from inside its process: what `python -m llm_engine bench` cannot tell from outside.

Runs in Triton's environment with the engine's folder on the path, measures one thing, and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llm_engine import Engine, EngineConfig, SamplingParams, SequenceRequest
from llm_engine.scoring import scores

MATRIX_ROWS, MATRIX_SIZE = 1024, 4096
"""The product whose rate counts as the machine's: so many rows by a square matrix."""

PREFILL_TOKENS = 1024
RUNNING_STREAMS = 31
RUNNING_PROMPT_TOKENS = 64
ARRIVING_TOKENS = 4000
CALM_STEPS = 100
MEMORY_SEQUENCES, MEMORY_TOKENS = 32, 2048
CHURN_ALIVE = 40
CHURN_LEAVING = 0.2
"""The chance of a step that somebody leaves."""

CHURN_WARM_UP = 5
"""In the first fifth of the time memory may still grow."""

LONG_ANSWER_TOKENS = 64

GREEDY = SamplingParams(temperature=0.0)


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-token-budget", type=int, default=EngineConfig.step_token_budget)
    parser.add_argument("--seconds", type=float, default=600.0, help="of churn")
    parser.add_argument("--text", type=Path, help="JSON file: the token ids of a text")
    parser.add_argument("--attention-window", type=int, default=EngineConfig.attention_window)
    parser.add_argument("--first", type=int, default=0, help="of a long text the place from which tokens count")
    options = parser.parse_args()
    print(json.dumps(MEASURES[options.what](options)), flush=True)


def share(options: argparse.Namespace) -> dict[str, object]:
    """What a prefill computes a second, against a large product of matrices in the same type, in turn."""
    engine = _engine(options, step_token_budget=PREFILL_TOKENS)
    dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}[engine.model_info.compute_dtype])
    left, right = (torch.randn(rows, MATRIX_SIZE).to(dtype) for rows in (MATRIX_ROWS, MATRIX_SIZE))
    product_operations = 2 * MATRIX_ROWS * MATRIX_SIZE**2
    operations = _prefill_operations(engine, PREFILL_TOKENS)
    rates, prefills = [], []
    for number in range(-1, 3 * options.rounds):
        rate = product_operations / _seconds(lambda: torch.mm(left, right))
        prefill = operations / _seconds(lambda number=number: _prefill(engine, number))
        if number >= 0:
            rates.append(rate)
            prefills.append(prefill)
    return {
        "share": statistics.median(one / other for one, other in zip(prefills, rates, strict=True)),
        "matrix_operations_per_second": statistics.median(rates),
        "prefill_operations_per_second": statistics.median(prefills),
        "compute_dtype": engine.model_info.compute_dtype,
    }


def gap(options: argparse.Namespace) -> dict[str, object]:
    """How long running streams wait between tokens, in calm and while a long prompt is computed beside them."""
    engine = _engine(options, kv_cache_bytes=1 << 30)
    calm: list[float] = []
    disturbed: list[float] = []
    for stream in range(RUNNING_STREAMS):
        _add(engine, f"stream-{stream}", _prompt(stream, RUNNING_PROMPT_TOKENS), 1 << 20)
    names = {f"stream-{stream}" for stream in range(RUNNING_STREAMS)}
    while {output.request_id for output in engine.step()} != names:
        pass
    calm_steps = CALM_STEPS // (options.rounds + 1)
    for number in range(options.rounds):
        calm += _gaps(engine, lambda ended, count: count == calm_steps)
        _add(engine, f"arriving-{number}", _prompt(1000 + number, ARRIVING_TOKENS), 1)
        name = f"arriving-{number}"
        disturbed += _gaps(engine, lambda ended, count, name=name: name in ended)
    # The streams have grown meanwhile. The hundredth of their gaps that is longest, disturbed or not, is from the end.
    calm += _gaps(engine, lambda ended, count: count == calm_steps)
    return {
        "ratio": _percentile(disturbed, 99) / _percentile(calm, 99),
        "calm_p50": statistics.median(calm),
        "calm_p99": _percentile(calm, 99),
        "disturbed_p50": statistics.median(disturbed),
        "disturbed_p99": _percentile(disturbed, 99),
        "step_token_budget": options.step_token_budget,
    }


def memory(options: argparse.Namespace) -> dict[str, object]:
    """What is resident at most when every KV block has been used, and how much of it the KV blocks are."""
    probe = _engine(options, kv_cache_bytes=1 << 26)
    # Of the probe's own bound, a block is lost to padding, and what remains of a division to nothing.
    token_bytes = _kv_token_bytes(probe)
    probe.close()
    del probe
    block = EngineConfig.block_token_count
    kv_bytes = (MEMORY_SEQUENCES * MEMORY_TOKENS + block) * token_bytes
    engine = _engine(
        options, kv_cache_bytes=kv_bytes, max_sequences=MEMORY_SEQUENCES, step_token_budget=max(1024, MEMORY_SEQUENCES)
    )
    # The first must still run when the last one's prompt is computed, some 70 steps later.
    output_tokens = 100
    for sequence in range(MEMORY_SEQUENCES):
        _add(engine, str(sequence), _prompt(sequence, MEMORY_TOKENS - output_tokens), output_tokens)
    fewest = engine.load.free_block_count
    while engine.has_work:
        engine.step()
        fewest = min(fewest, engine.load.free_block_count)
    load = engine.load
    assert not load.preemption_count, "the KV blocks did not suffice"
    return {
        "resident_bytes": _status_bytes("VmHWM"),
        "kv_bytes": kv_bytes,
        "kv_used": 1 - fewest / load.total_block_count,
    }


def churn(options: argparse.Namespace) -> dict[str, object]:
    """What hours of coming and going leave behind, in short: requests of all lengths, a third of which leave early."""
    drafts = {"speculation_tokens": EngineConfig.speculation_tokens, "speculation_sequences": CHURN_ALIVE}
    engine = _engine(options, kv_cache_bytes=1 << 27, prefix_reuse=True, **drafts)
    source, names = random.Random(0), itertools.count()
    alive: dict[str, None] = {}
    taken, left, grown_from = 0, 0, 0
    started = time.monotonic()
    while (passed := time.monotonic() - started) < options.seconds:
        while len(alive) < CHURN_ALIVE:
            name = str(next(names))
            # Some begin like others.
            prompt = _prompt(source.randrange(8), source.choice((0, 0, 64, 300))) + _prompt(
                source.randrange(1 << 30), source.randint(1, source.choice((40, 400, 1500)))
            )
            _add(engine, name, prompt, source.randint(1, 200), priority=source.randrange(3))
            alive[name] = None
            taken += 1
        for output in engine.step():
            if output.finish_reason:
                alive.pop(output.request_id, None)
        if source.random() < CHURN_LEAVING:
            name = source.choice(list(alive))
            left += engine.cancel(name)
            alive.pop(name)
        # By now everything has been used.
        if passed < options.seconds / CHURN_WARM_UP:
            grown_from = _status_bytes("VmRSS")
    grown = _status_bytes("VmRSS") - grown_from
    steps, preemptions = engine.load.step_count, engine.load.preemption_count
    for name in alive:
        engine.cancel(name)
    load = engine.load
    # One sequence can still have it all.
    longest = min(engine.model_info.context_token_count, load.total_block_count * load.block_token_count) - 1
    _add(engine, "longest", _prompt(1, longest), 1)
    reasons = [output.finish_reason for _ in iter(lambda: engine.has_work, False) for output in engine.step()]
    return {
        "grown_bytes": grown,
        "blocks_lost": load.total_block_count - load.free_block_count,
        "longest_ended": reasons[-1],
        "requests": taken,
        "left": left,
        "steps": steps,
        "preemptions": preemptions,
    }


def agreement(options: argparse.Namespace) -> dict[str, object]:
    """The perplexity of a text, and the likeliest token at each of its places."""
    engine = _engine(options)
    found = scores(engine, json.loads(options.text.read_text()))
    return {
        "perplexity": math.exp(-statistics.fmean(score.log_probability for score in found)),
        "likeliest": [score.likeliest_token_id for score in found],
        "compute_dtype": engine.model_info.compute_dtype,
    }


def long_text(options: argparse.Namespace) -> dict[str, object]:
    """A long text's perplexity from some place on, and what one sequence after it takes: blocks, and seconds a token.

    The text is computed twice: to be scored, and as a prompt.
    """
    engine = _engine(options, attention_window=options.attention_window)
    text = json.loads(options.text.read_text())
    found = scores(engine, text)[max(0, options.first - 1) :]
    _add(engine, "long", text, LONG_ANSWER_TOKENS)
    started, most_blocks = time.perf_counter(), 0
    while not engine.step():
        most_blocks = max(most_blocks, _used_block_count(engine))
    prefill_seconds = time.perf_counter() - started
    blocks = _used_block_count(engine)
    seconds = []
    while engine.has_work:
        seconds.append(_seconds(engine.step))
    return {
        "perplexity": math.exp(-statistics.fmean(score.log_probability for score in found)),
        "scored_tokens": len(found),
        "prefill_tokens_per_second": len(text) / prefill_seconds,
        "decode_tokens_per_second": 1 / statistics.median(seconds),
        "blocks": blocks,
        "most_blocks": max(most_blocks, blocks),
    }


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "share": share,
    "gap": gap,
    "memory": memory,
    "churn": churn,
    "agreement": agreement,
    "long-text": long_text,
}


def _engine(options: argparse.Namespace, **settings: int) -> Engine:
    given = {"step_token_budget": options.step_token_budget, "prefix_reuse": False, "speculation_tokens": 0, **settings}
    return Engine(
        EngineConfig(
            model_path=options.model,
            cache_dir=options.cache_dir,
            dtype=options.dtype,
            thread_count=options.threads,
            max_waiting=1000,
            **given,
        )
    )


def _prefill_operations(engine: Engine, tokens: int) -> float:
    """Operations of the model: two a parameter that is multiplied and token, and attention's, causal.

    The embedding is looked up, and as the output matrix multiplies one row alone.
    """
    model = engine.model_info
    vocabulary = model.vocabulary_size * model.hidden_size
    attention = 2 * model.layer_count * model.hidden_size * tokens**2
    return 2 * (model.parameter_count - vocabulary) * tokens + 2 * vocabulary + attention


def _used_block_count(engine: Engine) -> int:
    load = engine.load
    return load.total_block_count - load.free_block_count


def _kv_token_bytes(engine: Engine) -> int:
    model = engine.model_info
    itemsize = 4 if model.cache_dtype == "fp32" else 2
    return 2 * model.layer_count * model.kv_head_count * (model.hidden_size // model.head_count) * itemsize


def _prefill(engine: Engine, number: int) -> None:
    _add(engine, f"prefill-{number}", _prompt(number, PREFILL_TOKENS), 1)
    while engine.has_work:
        engine.step()


def _gaps(engine: Engine, is_over: Callable[[set[str], int], bool]) -> list[float]:
    """The seconds of each step until it is over: every running stream gets a token in each."""
    seconds: list[float] = []
    for count in itertools.count(1):
        started = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - started)
        running = sum(not output.finish_reason for output in outputs)
        assert running >= RUNNING_STREAMS, f"{running} of {RUNNING_STREAMS} streams got a token"
        if is_over({output.request_id for output in outputs if output.finish_reason}, count):
            break
    return seconds


def _add(engine: Engine, name: str, prompt: list[int], tokens: int, *, priority: int = 0) -> None:
    given = {"max_tokens": tokens, "sampling": GREEDY, "ignore_eos": True, "priority": priority}
    engine.add(SequenceRequest(request_id=name, token_ids=prompt, **given))


def _prompt(seed: int, tokens: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1000, 40000) for _ in range(tokens)]


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    sys.exit(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
