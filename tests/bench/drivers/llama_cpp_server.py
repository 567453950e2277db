"""llama.cpp's server, as the package xllamacpp embeds it: one slot a sequence, each answer streamed to a thread."""

from __future__ import annotations

import json
import threading
import time

import xllamacpp
from measure import Job, parse_job, report

BATCH_TOKENS = 2048


def main() -> None:
    """Measures one job, after a short one that warms up."""
    job = parse_job()
    server = xllamacpp.Server(_parameters(job))
    _stream(server, job.prompts[0], 4, [])
    moments: list[list[float]] = [[] for _ in job.prompts]
    work = zip(job.prompts, moments, strict=True)
    threads = [
        threading.Thread(target=_stream, args=(server, prompt, job.tokens, times), daemon=True)
        for prompt, times in work
    ]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    features = [part for part in xllamacpp.get_system_info().split(" | ") if part.strip()]
    report(job, begun, moments, version=xllamacpp.__version__, detail=" ".join(_enabled(features)))


def _parameters(job: Job) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job.model
    parameters.n_parallel = len(job.prompts)
    parameters.n_ctx = len(job.prompts) * job.context_tokens
    parameters.n_batch = BATCH_TOKENS
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job.threads
    parameters.cache_prompt = False
    parameters.cache_ram_mib = 0
    parameters.verbosity = -1
    return parameters


def _stream(server: xllamacpp.Server, prompt: list[int], tokens: int, moments: list[float]) -> None:
    """Continues one prompt; a chunk is a token, and the last one tells the counts instead."""

    def take(chunk: object) -> bool:
        moments.append(time.perf_counter())
        chunks.append(chunk)
        return False

    chunks: list[object] = []
    request = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
        "stream": True,
    }  # fmt: skip
    server.handle_completions(request, take)
    last = chunks[-1]
    last = json.loads(last) if isinstance(last, str | bytes) else last
    # A token that ends inside a character brings no chunk of its own; what came is then stretched over all tokens.
    assert isinstance(last, dict), last
    generated = last["usage"]["completion_tokens"]
    moments[:] = _one_a_token(moments[: len(chunks) - 1], generated)


def _one_a_token(moments: list[float], count: int) -> list[float]:
    """As many moments as tokens: where chunks are fewer, some carried two."""
    return [moments[min(len(moments) - 1, place * len(moments) // count)] for place in range(count)]


def _enabled(features: list[str]) -> list[str]:
    return [
        name.split(":")[-1].strip() for name, _, value in (each.partition("=") for each in features) if "1" in value
    ]


if __name__ == "__main__":
    main()
