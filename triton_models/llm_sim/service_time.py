"""How long a step of a simulated engine takes, and the engines that are known by name.

Pure. A step takes `base_step_seconds`, and for each sequence that gets a token by decoding and each prompt token that
it computes some more: what a step of continuous batching costs while it is bound by reading the weights
once (the base), by each sequence's KV blocks and sampling, and by the arithmetic of prompts.

Where the presets come from
---------------------------

`h200-8b` and `h200-70b` are fitted to the throughput that NVIDIA publishes for one H200 with FP8 weights and KV cache
(TensorRT-LLM 1.0, docs/source/performance/perf-overview.md; prompt/output tokens, output tokens/s at full load):

| | 2048/128 | 128/2048 | 1000/1000 |
| --- | --- | --- | --- |
| Llama 3.1 8B | 3,538 | 26,221 | 17,744 |
| Llama 3.3 70B | 442 | 4,336 | 2,909 |

With p seconds a prompt token and d a decoded one, the first two columns are 16 p + d = 1/rate and p/16 + d = 1/rate:
p = 15.3 us, d = 37.2 us (8B); p = 127.5 us, d = 222.6 us (70B). The third column, which was not used, comes out as
19,040 (7 % too high) and 2,856 (2 % too low). The base is estimated from memory bandwidth: the weights once at
4.8 TB/s, 8.03 GB in 1.7 ms and 70.6 GB in 14.7 ms; what is left of d at the batches that fill the memory in the second
column (about 1,650 and 330 sequences) is the cost of one sequence in a step: 36 us and 178 us. KV blocks fill what
weights leave of 90 % of 141 GB, at 64 and 160 KiB a token. They run fewer sequences at once than such an engine could,
so that a mesh on a few processors keeps up; `max_sequences` raises that.

`smollm2-cpu` is this repository's engine with SmolLM2-135M in fp32 on one thread of a shared x86 processor, measured by

    python -m llm_engine bench --threads 1 --tokens 24 --prompt-tokens 64 --sequences N --model FILE

A step of N decoding sequences took 51 ms (1), 128 ms (16) and 208 ms (32), which is 46 ms and 5.0 ms a sequence; the
first token of one prompt of 64 tokens took 209 ms, which is 2.55 ms a prompt token. The last first token of 32 prompts,
which was not used, took 7.65 s and comes out as 7.6 s. 512 MiB hold 727 KV blocks of 16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTime:
    """The three costs of a step, in seconds."""

    base_step_seconds: float
    seconds_per_sequence: float
    seconds_per_prefill_token: float

    def step_seconds(self, decode_count: int, prefill_token_count: int) -> float:
        """How long a step takes that decodes so many sequences and computes so many prompt tokens."""
        return (
            self.base_step_seconds
            + self.seconds_per_sequence * decode_count
            + self.seconds_per_prefill_token * prefill_token_count
        )


PRESETS: dict[str, dict[str, object]] = {
    "h200-8b": {
        "base_step_seconds": 1.7e-3,
        "seconds_per_sequence": 36e-6,
        "seconds_per_prefill_token": 15.3e-6,
        "max_sequences": 64,
        "kv_block_count": 113_000,
        "step_token_budget": 2048,
    },
    "h200-70b": {
        "base_step_seconds": 14.7e-3,
        "seconds_per_sequence": 178e-6,
        "seconds_per_prefill_token": 127.5e-6,
        "max_sequences": 32,
        "kv_block_count": 21_400,
        "step_token_budget": 2048,
    },
    "smollm2-cpu": {
        "base_step_seconds": 46e-3,
        "seconds_per_sequence": 5.0e-3,
        "seconds_per_prefill_token": 2.55e-3,
        "max_sequences": 32,
        "kv_block_count": 727,
        "step_token_budget": 128,
    },
}
"""Settings by the name of the engine that they imitate."""
