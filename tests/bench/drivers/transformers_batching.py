"""transformers' continuous batching (`generate_batch`), on the same weights as a Hugging Face folder."""

from __future__ import annotations

import time

import torch
import transformers
from measure import parse_job, report

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    """Measures one job, after a short one that warms up."""
    job = parse_job()
    torch.set_num_threads(job.threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.model, dtype=DTYPES[job.dtype], attn_implementation="sdpa"
    ).eval()
    config = transformers.GenerationConfig(
        max_new_tokens=job.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
    )
    # Its own thread computes, so nothing is gained by telling this one not to track gradients.
    model.requires_grad_(False)
    model.generate_batch(job.prompts[:1], generation_config=config, max_new_tokens=4)
    begun = time.perf_counter()
    outputs = model.generate_batch(job.prompts, generation_config=config, record_timestamps=True)
    failed = [output.error for output in outputs.values() if output.error]
    assert not failed, failed[0]
    moments = [list(output.timestamps) for output in outputs.values()]
    report(job, begun, moments, version=transformers.__version__, detail=f"{job.dtype}, paged sdpa")


if __name__ == "__main__":
    main()
