"""transformers' continuous batching (`generate_batch`), on the same weights as a Hugging Face folder.

A folder with a config.json alone gets random weights.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from measure import Job, parse_job, report

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    """Measures one job, after one of the same sizes that warms up."""
    job = parse_job()
    torch.set_num_threads(job.threads)
    transformers.utils.logging.set_verbosity_error()
    attention = "flash_attention_2" if transformers.utils.is_flash_attn_2_available() else "sdpa"
    model = _model(job, attention)
    config = transformers.GenerationConfig(max_new_tokens=job.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Its own thread computes, so nothing is gained by telling this one not to track gradients.
    model.requires_grad_(False)
    # Its memory and what it has compiled are kept for the second; nothing that it could know of its prompts.
    kept = {"generation_config": config, "persistent_manager": True}
    model.generate_batch([prompt[::-1] for prompt in job.prompts], **kept)
    begun = time.perf_counter()
    outputs = model.generate_batch(job.prompts, record_timestamps=True, **kept)
    model.destroy_cached_continuous_batching_manager()
    failed = [output.error for output in outputs.values() if output.error]
    assert not failed, failed[0]
    moments = [list(output.timestamps) for output in outputs.values()]
    report(job, begun, moments, version=transformers.__version__, detail=f"{job.dtype}, paged {attention}")


def _model(job: Job, attention: str) -> transformers.PreTrainedModel:
    given = {"dtype": DTYPES[job.dtype], "attn_implementation": attention}
    if any(Path(job.model).glob("*.safetensors")):
        return transformers.AutoModelForCausalLM.from_pretrained(job.model, **given).to(job.device).eval()
    with torch.device(job.device):
        config = transformers.AutoConfig.from_pretrained(job.model)
        return transformers.AutoModelForCausalLM.from_config(config, **given).to(job.device).eval()


if __name__ == "__main__":
    main()
