"""What the peers' drivers share: their command line, how a rate is counted, and their one line of JSON.

Runs in every peer's environment, so it imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What is to be measured."""

    model: str
    """The GGUF file, or for engines that read none a Hugging Face folder with the same weights."""
    prompts: list[list[int]]
    """Token ids, one list a sequence; all begin at once."""
    tokens: int
    """Output tokens of each sequence; the end-of-sequence token does not end one."""
    threads: int
    dtype: str
    """bf16 or fp32, for engines that do not compute from the file's own type."""
    context_tokens: int
    """The longest sequence, prompt and output together, rounded up."""
    device: str
    """cpu or cuda, for engines that have a choice."""


def parse_job() -> Job:
    """The job of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON file: a list of lists of token ids")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    prompts = json.loads(given.prompts.read_text())
    longest = max(map(len, prompts)) + given.tokens
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    context = (longest // 64 + 1) * 64
    return Job(given.model, prompts, given.tokens, given.threads, given.dtype, context, given.device)


def decode_tokens_per_second(moments: list[list[float]]) -> float | None:
    """Tokens per second while all sequences run: from the last one's first token to the first one's last.

    Args:
        moments: of each sequence, when each of its tokens came.
    """
    begin, end = max(each[0] for each in moments), min(each[-1] for each in moments)
    count = sum(begin < moment <= end for each in moments for moment in each)
    return count / (end - begin) if end > begin else None


def report(job: Job, begun: float, moments: list[list[float]], **more: object) -> None:
    """Writes the result of one run that began at `begun`, on the clock of `moments`."""
    short = [len(each) for each in moments if len(each) != job.tokens]
    if short:
        sys.exit(f"{len(short)} of {len(moments)} sequences have not {job.tokens} tokens; the first has {short[0]}")
    last_first = max(each[0] for each in moments) - begun
    result = {
        "decode_tokens_per_second": decode_tokens_per_second(moments),
        "prompt_tokens_per_second": sum(map(len, job.prompts)) / last_first,
        "tokens_per_second": sum(map(len, moments)) / (max(each[-1] for each in moments) - begun),
        **more,
    }
    print(json.dumps(result), flush=True)
