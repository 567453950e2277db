"""openvino-genai's continuous batching over the GGUF file, step by step."""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai
from measure import Job, parse_job, report

CACHE_GIB = 1


def main() -> None:
    """Measures one job, after a short one that warms up."""
    job = parse_job()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = max(32, len(job.prompts))
    scheduler.max_num_batched_tokens = 2048
    properties = {"INFERENCE_NUM_THREADS": job.threads, "NUM_STREAMS": 1}
    pipeline = openvino_genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", properties)
    _run(pipeline, job, job.prompts[:1], 4)
    begun = time.perf_counter()
    moments = _run(pipeline, job, job.prompts, job.tokens)
    report(job, begun, moments, version=openvino_genai.__version__.split("-")[0], detail="Q4_1 as read from the file")


def _run(
    pipeline: openvino_genai.ContinuousBatchingPipeline, job: Job, prompts: list[list[int]], tokens: int
) -> list[list[float]]:
    """When each token of each sequence came."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = tokens
    config.ignore_eos = True
    config.do_sample = False
    handles = [
        pipeline.add_request(place, openvino.Tensor(np.array([prompt], np.int64)), config)
        for place, prompt in enumerate(prompts)
    ]
    moments: list[list[float]] = [[] for _ in prompts]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now = time.perf_counter()
        for handle, times in zip(handles, moments, strict=True):
            while handle.can_read():
                times += [now] * sum(len(output.generated_ids) for output in handle.read().values())
    return moments


if __name__ == "__main__":
    main()
