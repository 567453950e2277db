"""Requests and outputs as named arrays, the way any Triton client sees them.

Pure: arrays in, plain data out, and back. The names, types and shapes are those of config.pbtxt, which Triton
checks; what they mean to the engine, and their ranges, the engine checks.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np

from llm_engine import EngineLoad, RequestRefused, SamplingParams, SequenceOutput, SequenceRequest

INVALID_VALUE = "INVALID_VALUE"

DEFAULT_MAX_TOKENS = 16
"""What a Triton client gets that names no bound; OpenAI's default for completions."""

Arrays = Mapping[str, np.ndarray]

_LENGTH = struct.Struct("<I")

_LOGIT_BIAS = ("logit_bias_token_ids", "logit_bias_values")


def sequence_request(request_id: str, arrays: Arrays) -> SequenceRequest:
    """The request that the arrays name; RequestRefused where an array has not the shape that it must have."""
    if "token_ids" not in arrays:
        raise RequestRefused(INVALID_VALUE, "token_ids is missing")
    return SequenceRequest(
        request_id=request_id,
        token_ids=_flat("token_ids", arrays),
        prior_output_count=int(_one(arrays, "prior_output_count", 0)),
        max_tokens=int(_one(arrays, "max_tokens", DEFAULT_MAX_TOKENS)),
        sampling=_sampling(arrays),
        stop_token_ids=tuple(_flat("stop_token_ids", arrays).tolist()) if "stop_token_ids" in arrays else (),
        ignore_eos=bool(_one(arrays, "ignore_eos", False)),
        priority=int(_one(arrays, "priority", 0)),
        cache_salt=text(arrays, "cache_salt"),
    )


def text(arrays: Arrays, name: str, default: str = "") -> str:
    """The one text of a BYTES array; RequestRefused where it is not UTF-8."""
    value = _one(arrays, name, default)
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestRefused(INVALID_VALUE, f"{name} is not UTF-8") from error


def output_arrays(output: SequenceOutput, load: EngineLoad) -> dict[str, np.ndarray]:
    """One sequence's output as arrays; those of log-probabilities only where they were asked for."""
    arrays = {
        "token_ids": np.array(output.token_ids, np.int32),
        "finish_reason": texts([output.finish_reason]),
        "engine_load": load_array(load),
    }
    if output.cached_token_count:
        arrays["cached_token_count"] = np.array([output.cached_token_count], np.int32)
    if output.finish_reason == "error":
        arrays["error"] = texts([error_text(output.error_reason, output.error_message)])
    if output.logprobs is not None:
        arrays["logprobs"] = np.array(output.logprobs, np.float32)
    if output.top_token_ids and output.top_token_ids[0]:
        arrays["top_token_ids"] = np.array(output.top_token_ids, np.int32)
        arrays["top_logprobs"] = np.array(output.top_logprobs, np.float32)
    return arrays


def bundle_arrays(outputs: Sequence[SequenceOutput], load: EngineLoad) -> dict[str, np.ndarray]:
    """Outputs of many sequences as one response's arrays.

    `request_ids` and `token_counts` say whose tokens stand in `token_ids`, in order. `cached_token_counts`,
    `finish_reasons` and `errors` are there only where one of the sequences has something to say.
    Log-probabilities do not travel in bundles.
    """
    arrays = {"engine_load": load_array(load)}
    if not outputs:
        return arrays
    arrays["request_ids"] = _joined_texts([output.request_id for output in outputs])
    arrays["token_counts"] = np.array([len(output.token_ids) for output in outputs], np.int32)
    arrays["token_ids"] = np.array([token for output in outputs for token in output.token_ids], np.int32)
    if any(output.cached_token_count for output in outputs):
        arrays["cached_token_counts"] = np.array([output.cached_token_count for output in outputs], np.int32)
    if any(output.finish_reason for output in outputs):
        arrays["finish_reasons"] = texts([output.finish_reason for output in outputs])
    if any(output.error_reason for output in outputs):
        arrays["errors"] = texts([_error_of(output) for output in outputs])
    return arrays


def _error_of(output: SequenceOutput) -> str:
    return error_text(output.error_reason, output.error_message) if output.error_reason else ""


def error_arrays(reason: str, message: str, load: EngineLoad | None) -> dict[str, np.ndarray]:
    """A refusal as arrays: no tokens, finish reason error."""
    arrays = {
        "token_ids": np.empty(0, np.int32),
        "finish_reason": texts(["error"]),
        "error": texts([error_text(reason, message)]),
    }
    return arrays if load is None else {**arrays, "engine_load": load_array(load)}


def error_text(reason: str, message: str) -> str:
    """`REASON: message`, the form of the output named error."""
    return f"{reason}: {message}"


def load_array(load: EngineLoad) -> np.ndarray:
    """[9] int32: running, waiting, bounds of both, free and all blocks, tokens a block, preemptions, reuse."""
    return np.array(
        [
            load.running,
            load.waiting,
            load.max_sequences,
            load.max_waiting,
            load.free_block_count,
            load.total_block_count,
            load.block_token_count,
            load.preemption_count,
            load.reuses_prefixes,
        ],
        np.int32,
    )


def texts(values: Sequence[str]) -> np.ndarray:
    """[count] BYTES."""
    return np.array([value.encode() for value in values], np.object_)


def _joined_texts(values: Sequence[str]) -> np.ndarray:
    """[size] UINT8: BYTES as they travel. Triton's Python backend takes 0.1 ms to make this of 32 texts."""
    encoded = [value.encode() for value in values]
    return np.frombuffer(b"".join([part for each in encoded for part in (_LENGTH.pack(len(each)), each)]), np.uint8)


def _sampling(arrays: Arrays) -> SamplingParams:
    given: dict[str, object] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        if name in arrays:
            given[name] = float(_one(arrays, name, 0.0))
    for name in ("top_k", "seed"):
        if name in arrays:
            given[name] = int(_one(arrays, name, 0))
    if "logit_bias_token_ids" in arrays or "logit_bias_values" in arrays:
        given["logit_bias"] = _logit_bias(arrays)
    for name in ("json_schema", "grammar", "grammar_kind"):
        if name in arrays:
            given[name] = text(arrays, name)
    logprobs = int(_one(arrays, "logprobs", -1))
    if logprobs < -1:
        raise RequestRefused(INVALID_VALUE, f"logprobs is {logprobs}, expected -1 (none) or more")
    return SamplingParams(**given, logprobs=None if logprobs == -1 else logprobs)  # type: ignore[arg-type]


def _logit_bias(arrays: Arrays) -> dict[int, float]:
    ids, values = (_flat(name, arrays).tolist() if name in arrays else [] for name in _LOGIT_BIAS)
    if len(ids) != len(values):
        counts = f"{len(ids)} tokens, and logit_bias_values {len(values)}"
        raise RequestRefused(INVALID_VALUE, f"logit_bias_token_ids has {counts}: expected as many of both")
    bias = dict(zip(ids, values, strict=True))
    if len(bias) != len(ids):
        raise RequestRefused(INVALID_VALUE, "logit_bias_token_ids names a token twice")
    return bias


def _one(arrays: Arrays, name: str, default: object) -> object:
    if name not in arrays:
        return default
    array = arrays[name]
    if array.size != 1:
        raise RequestRefused(INVALID_VALUE, f"{name} has shape {list(array.shape)}, expected one value")
    return array.reshape(-1)[0]


def _flat(name: str, arrays: Arrays) -> np.ndarray:
    array = arrays[name]
    if array.ndim != 1:
        raise RequestRefused(INVALID_VALUE, f"{name} has shape {list(array.shape)}, expected one dimension")
    return array
