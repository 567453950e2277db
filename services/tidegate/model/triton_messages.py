"""What the model service and Triton's model `llm` say to each other, as KServe v2 messages.

Pure conversions, with no connection and no clock. The conversation is told in triton_models/llm/1/triton_model.py; the
tensors' names and types stand in its config.pbtxt. Arrays are little endian, as KServe has them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from tidegate.v1 import inference_pb2

Message: TypeAlias = Any
"""tritonclient ships no types for its messages."""

ENGINE_UNAVAILABLE: Final = "ENGINE_UNAVAILABLE"
"""The reason word of an engine that is broken or shutting down: it takes nothing more."""

ERROR: Final = "error"
"""The finish reason of a sequence that could not be finished."""

_GRAMMAR_KINDS: Final = {inference_pb2.GRAMMAR_KIND_LARK: "lark", inference_pb2.GRAMMAR_KIND_REGEX: "regex"}


class ArenaSlice(msgspec.Struct, frozen=True):
    """Token ids (int32) that lie in a registered shared-memory region."""

    region: str
    byte_offset: int
    byte_count: int


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. An absent sampling parameter takes the engine's default, which is the API's."""

    request_id: str
    tokens: NDArray[np.int32] | ArenaSlice
    """The prompt, and after it the output of an earlier run. A slice must stay until the first output is here."""
    prior_output_count: int = 0
    """How many tokens at the end of `tokens` are output already."""
    max_tokens: int
    """The most output tokens, prior ones included."""
    sampling: inference_pb2.SamplingParameters
    logprobs: int | None = None
    """Log-probabilities of each token and of so many alternatives."""
    stop_token_ids: Sequence[int] = ()
    """Empty: the model's own."""
    ignore_eos: bool = False
    priority: int = 0
    """Lower is more urgent."""
    cache_salt: str = ""
    """Whose prompt it is: its beginning is reused only among those with the same one."""


class EngineLoad(msgspec.Struct, frozen=True):
    """How full the engine is; the order is that of the output `engine_load`."""

    running: int
    waiting: int
    max_sequences: int
    max_waiting: int
    free_blocks: int
    total_blocks: int
    block_token_count: int
    preemptions: int
    reuses_prefixes: int = 0
    """1 where prompts that begin alike share what is computed of them."""


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one sequence: everything since the output before."""

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_token_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None
    finish_reason: str = ""
    """Empty while it runs; then stop, length, cancelled or error. Nothing follows."""
    error: str = ""
    """With error: `REASON: message`."""
    cached_token_count: int = 0
    """Tokens, first of the prompt, that were not computed, since another one began alike."""
    load: EngineLoad | None = None


def generate_message(model_name: str, request: EngineRequest, sequence_id: str, subscription: str | None) -> Message:
    """The request that starts a sequence; with a subscription its outputs come in that one's responses."""
    message = service_pb2.ModelInferRequest(model_name=model_name, id=sequence_id)
    _add_tokens(message, request.tokens)
    _add(message, "max_tokens", "INT32", "<i", request.max_tokens)
    if request.prior_output_count:
        _add(message, "prior_output_count", "INT32", "<i", request.prior_output_count)
    given = {field.name for field, _ in request.sampling.ListFields()}
    for name, data_type, form in _SAMPLING_TENSORS:
        if name in given:
            _add(message, name, data_type, form, getattr(request.sampling, name))
    if request.sampling.logit_bias:
        bias = sorted(request.sampling.logit_bias.items())
        _add_array(message, "logit_bias_token_ids", np.asarray([token_id for token_id, _ in bias], "<i4"))
        _add_array(message, "logit_bias_values", np.asarray([value for _, value in bias], "<f4"), "FP32")
    if request.sampling.json_schema:
        _add_text(message, "json_schema", request.sampling.json_schema)
    if request.sampling.grammar:
        _add_text(message, "grammar", request.sampling.grammar)
        _add_text(message, "grammar_kind", _GRAMMAR_KINDS.get(request.sampling.grammar_kind, ""))
    if request.logprobs is not None:
        _add(message, "logprobs", "INT32", "<i", request.logprobs)
    if request.stop_token_ids:
        _add_array(message, "stop_token_ids", np.asarray(request.stop_token_ids, "<i4"))
    if request.ignore_eos:
        _add(message, "ignore_eos", "BOOL", "?", True)
    if request.priority:
        _add(message, "priority", "INT32", "<i", request.priority)
    if request.cache_salt:
        _add_text(message, "cache_salt", request.cache_salt)
    if subscription is not None:
        _add_text(message, "subscription", subscription)
    return message


def command_message(model_name: str, command: str, message_id: str, target_request_id: str = "") -> Message:
    """A command other than generate."""
    message = service_pb2.ModelInferRequest(model_name=model_name, id=message_id)
    _add_text(message, "command", command)
    if target_request_id:
        _add_text(message, "target_request_id", target_request_id)
    return message


def subscribe_message(model_name: str, subscription: str) -> Message:
    """The request whose responses carry the outputs of all sequences; its end is told by an empty response."""
    message = command_message(model_name, "subscribe", subscription)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def is_final(response: Message) -> bool:
    """Whether a subscription's response is the one that ends it."""
    return "triton_final_response" in response.parameters and response.parameters["triton_final_response"].bool_param


def parse_load(response: Message) -> EngineLoad | None:
    """The load that a response carries, if any."""
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "engine_load":
            return EngineLoad(*_integers(raw))
    return None


def parse_output(response: Message) -> EngineOutput:
    """A response to one sequence's own request."""
    raws = _raws(response)
    load = raws.get("engine_load")
    logprobs = raws.get("logprobs")
    width = _last_dimension(response, "top_token_ids")
    return EngineOutput(
        token_ids=_integers(raws.get("token_ids", b"")),
        logprobs=None if logprobs is None else _floats(logprobs),
        top_token_ids=None if width is None else _rows(_integers(raws["top_token_ids"]), width),
        top_logprobs=None if width is None else _rows(_floats(raws["top_logprobs"]), width),
        finish_reason=_first_text(raws, "finish_reason"),
        error=_first_text(raws, "error"),
        cached_token_count=sum(_integers(raws.get("cached_token_count", b""))),
        load=None if load is None else EngineLoad(*_integers(load)),
    )


class Bundle(msgspec.Struct, frozen=True):
    """What one step or some gave all sequences of a subscription."""

    load: EngineLoad | None
    outputs: list[tuple[str, EngineOutput]]
    """By the sequence's id."""
    error: str
    """Why the subscription could not be opened; empty for none."""


def parse_bundle(response: Message) -> Bundle:
    """A subscription's response."""
    raws = _raws(response)
    load_raw = raws.get("engine_load")
    load = None if load_raw is None else EngineLoad(*_integers(load_raw))
    ids = list(_texts(raws.get("request_ids", b"")))
    finish_reasons = list(_texts(raws["finish_reasons"])) if "finish_reasons" in raws else None
    errors = list(_texts(raws["errors"])) if "errors" in raws else None
    cached = _integers(raws["cached_token_counts"]) if "cached_token_counts" in raws else None
    token_ids = _integers(raws.get("token_ids", b""))
    outputs = []
    start = 0
    for index, (sequence_id, count) in enumerate(zip(ids, _integers(raws.get("token_counts", b"")), strict=True)):
        output = EngineOutput(
            token_ids=token_ids[start : start + count],
            finish_reason=finish_reasons[index] if finish_reasons else "",
            error=errors[index] if errors else "",
            cached_token_count=cached[index] if cached else 0,
            load=load,
        )
        outputs.append((sequence_id, output))
        start += count
    return Bundle(load, outputs, _first_text(raws, "error"))


def merged(outputs: Sequence[EngineOutput]) -> EngineOutput:
    """Outputs of one sequence that follow each other, as one."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    return EngineOutput(
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=_joined([output.logprobs for output in outputs]),
        top_token_ids=_joined([output.top_token_ids for output in outputs]),
        top_logprobs=_joined([output.top_logprobs for output in outputs]),
        finish_reason=last.finish_reason,
        error=last.error,
        cached_token_count=last.cached_token_count,
        load=last.load,
    )


_SAMPLING_TENSORS: Final = (
    ("temperature", "FP32", "<f"),
    ("top_k", "INT32", "<i"),
    ("top_p", "FP32", "<f"),
    ("min_p", "FP32", "<f"),
    ("seed", "INT64", "<q"),
    ("repetition_penalty", "FP32", "<f"),
    ("frequency_penalty", "FP32", "<f"),
    ("presence_penalty", "FP32", "<f"),
)


def _add_tokens(message: Message, tokens: NDArray[np.int32] | ArenaSlice) -> None:
    if isinstance(tokens, ArenaSlice):
        tensor = message.inputs.add(name="token_ids", datatype="INT32", shape=[tokens.byte_count // 4])
        tensor.parameters["shared_memory_region"].string_param = tokens.region
        tensor.parameters["shared_memory_byte_size"].int64_param = tokens.byte_count
        tensor.parameters["shared_memory_offset"].int64_param = tokens.byte_offset
    else:
        _add_array(message, "token_ids", np.ascontiguousarray(tokens, "<i4"))


def _add_array(message: Message, name: str, array: NDArray[Any], data_type: str = "INT32") -> None:
    message.inputs.add(name=name, datatype=data_type, shape=[array.size])
    message.raw_input_contents.append(array.tobytes())


def _add(message: Message, name: str, data_type: str, form: str, value: float) -> None:
    message.inputs.add(name=name, datatype=data_type, shape=[1])
    message.raw_input_contents.append(struct.pack(form, value))


def _add_text(message: Message, name: str, text: str) -> None:
    encoded = text.encode()
    message.inputs.add(name=name, datatype="BYTES", shape=[1])
    message.raw_input_contents.append(struct.pack("<I", len(encoded)) + encoded)


def _raws(response: Message) -> dict[str, bytes]:
    names = [output.name for output in response.outputs]
    return dict(zip(names, response.raw_output_contents, strict=True))


def _last_dimension(response: Message, name: str) -> int | None:
    for output in response.outputs:
        if output.name == name:
            return int(output.shape[-1])
    return None


def _integers(raw: bytes) -> list[int]:
    return memoryview(raw).cast("i").tolist()


def _floats(raw: bytes) -> list[float]:
    return [*memoryview(raw).cast("f")]


def _rows(values: list[Any], width: int) -> list[list[Any]]:
    return [values[start : start + width] for start in range(0, len(values), width)]


def _texts(raw: bytes) -> Iterator[str]:
    """Each is a 4-byte length and as many bytes."""
    start = 0
    while start < len(raw):
        (length,) = struct.unpack_from("<I", raw, start)
        start += 4 + length
        yield raw[start - length : start].decode()


def _first_text(raws: dict[str, bytes], name: str) -> str:
    return next(_texts(raws.get(name, b"")), "")


def _joined(parts: Sequence[list[Any] | None]) -> list[Any] | None:
    present = [part for part in parts if part is not None]
    return [value for part in present for value in part] if present else None
