"""Names for what can be reused: hashes of a prompt's blocks, and the key of a whole answer.

Block hashes are chained, so equal hashes mean equal prompts up to that block, and salted with model and tenant, so
that tenants learn nothing of each other. They steer placement and need not resist forgery; the answer's key decides
what a client is shown and is therefore SHA-256.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from tidegate.v1 import inference_pb2

BLOCK_TOKEN_COUNT: Final = 16
"""Tokens in a block; the same as in preprocess.proto."""

_ANSWER_KEY_VERSION: Final = b"tidegate-answer-1"

_DEFAULT_TEMPERATURE: Final = 1.0


def block_hashes(
    token_ids: Sequence[int] | NDArray[np.int32], *, model: str, tenant: str, block_token_count: int = BLOCK_TOKEN_COUNT
) -> list[int]:
    """One chained 64-bit hash a whole block, first block first; a last, partial block has none."""
    assert block_token_count > 0, block_token_count
    data = np.asarray(token_ids, dtype="<i4").tobytes()
    block_bytes = 4 * block_token_count
    previous = xxhash.xxh64_digest(_with_lengths(b"tidegate-block-1", model.encode(), tenant.encode()))
    hashes: list[int] = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        previous = xxhash.xxh64_digest(previous + data[start : start + block_bytes])
        hashes.append(int.from_bytes(previous, "big"))
    return hashes


def answer_key(
    token_ids: Sequence[int] | NDArray[np.int32],
    *,
    model: str,
    tenant: str,
    sampling: inference_pb2.SamplingParameters,
    max_tokens: int,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    ignore_eos: bool = False,
) -> bytes:
    """The 32-byte key of exactly this answer; empty when the same request may be answered differently.

    An answer is deterministic when it is greedy (temperature 0) or has a seed. Defaults are filled in first, so a
    request that names a default and one that leaves it out share a key.
    """
    if not is_deterministic(sampling):
        return b""
    digest = hashlib.sha256(_with_lengths(_ANSWER_KEY_VERSION, model.encode(), tenant.encode()))
    digest.update(_with_lengths(np.asarray(token_ids, dtype="<i4").tobytes(), _sampling_bytes(sampling)))
    digest.update(struct.pack("<qqq?", max_tokens, -1 if logprobs is None else logprobs, len(stop), ignore_eos))
    digest.update(_with_lengths(*(text.encode() for text in stop)))
    return digest.digest()


def is_deterministic(sampling: inference_pb2.SamplingParameters) -> bool:
    """Whether the same request always has the same answer."""
    temperature = sampling.temperature if sampling.HasField("temperature") else _DEFAULT_TEMPERATURE
    return temperature == 0 or sampling.HasField("seed")


def _sampling_bytes(sampling: inference_pb2.SamplingParameters) -> bytes:
    temperature = sampling.temperature if sampling.HasField("temperature") else _DEFAULT_TEMPERATURE
    penalties = (
        sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    biases = b"".join(struct.pack("<if", *entry) for entry in sorted(sampling.logit_bias.items()))
    bounds = _with_lengths(biases, sampling.json_schema.encode(), *_grammar_parts(sampling))
    if temperature == 0:
        # A greedy choice does not look at the seed, nor at how many of the likeliest tokens stay.
        return struct.pack("<4f", 0.0, *penalties) + bounds
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    chances = struct.pack("<4fiq2f", temperature, *penalties, sampling.top_k, sampling.seed, top_p, sampling.min_p)
    return chances + bounds


def _grammar_parts(sampling: inference_pb2.SamplingParameters) -> tuple[bytes, ...]:
    return (sampling.grammar.encode(), struct.pack("<i", sampling.grammar_kind)) if sampling.grammar else ()


def _with_lengths(*parts: bytes) -> bytes:
    """The parts one after the other, each after its length, so that no two lists look the same."""
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)
