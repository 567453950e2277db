"""Events of an answer as OpenAI's JSON and server-sent events.

Invariants:
- A stream ends with `[DONE]` when the answer is complete, and with an error object, and nothing after it, when not.
- What does not change within a stream is encoded once: an event costs one JSON string between two constants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from tidegate.common.errors import Reason, TidegateError, from_status, openai_body
from tidegate.openai.request import OpenAIRequest
from tidegate.v1 import inference_pb2

DONE: Final = b"data: [DONE]\n\n"

LOWEST_LOGPROB: Final = -9999.0
"""What OpenAI writes for a probability of zero: JSON has no infinity."""

_FINISH_REASONS: Final = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_ERROR: "error",
}

_SERVED_TIERS: Final = {"auto": "default", "default": "default", "standard": "default"}
"""The tier that a response names is the one that served it, which is never `auto`."""

_LINE_BREAKS: Final = (
    (b"\xc2\x85", b"\\u0085"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)
"""Line breaks to Unicode but not to JSON or to server-sent events: many clients would cut a line there."""

_PLACE: Final = "\x00place\x00"


class ResponseFormatter:
    """Formats one answer, either event by event (`event`) or whole (`complete`).

    Args:
        request: the request as it was parsed.
        request_id: the mesh's id of it; part of the response's id.
        created_unix_seconds: when the answer began.
    """

    def __init__(self, request: OpenAIRequest, request_id: str, created_unix_seconds: int) -> None:
        self._request = request
        self._is_chat = request.kind == "chat"
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + request_id
        self._created = created_unix_seconds
        self._text_offset = 0
        self._set_model(request.model)

    def event(self, event: inference_pb2.GenerateEvent) -> bytes:
        """The server-sent events for one event: none, one or several. After `finished`, nothing more may come."""
        kind = event.WhichOneof("event")
        if kind == "delta":
            return self._delta(event.delta)
        if kind == "started":
            self._set_model(event.started.model)
            return self._role_chunk
        if kind == "finished":
            return self._finished(event.finished)
        return b""

    def complete(self, events: Iterable[inference_pb2.GenerateEvent]) -> bytes:
        """The whole answer as one JSON object.

        Raises:
            TidegateError: the answer ended in an error, or did not end.
        """
        texts: list[str] = []
        logprobs: list[inference_pb2.TokenLogprob] = []
        finished: inference_pb2.Finished | None = None
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "delta":
                texts.append(event.delta.text)
                logprobs.extend(event.delta.logprobs)
            elif kind == "started":
                self._set_model(event.started.model)
            elif kind == "finished":
                finished = event.finished
        if finished is None:
            raise TidegateError(Reason.INTERNAL_ERROR, "The answer ended before it was complete.")
        if finished.reason == inference_pb2.FINISH_REASON_ERROR:
            raise from_status(finished.error)
        return msgspec.json.encode(self._whole("".join(texts), logprobs, finished))

    def error(self, error: TidegateError) -> bytes:
        """The end of a stream that cannot go on: a chunk with finish_reason `error`, then the error object."""
        return self._chunk({} if self._is_chat else "", None, "error") + _sse(openai_body(error))

    def _set_model(self, model: str) -> None:
        """Encodes what stays the same in every chunk."""
        self._model = model
        self._head: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": self._created,
            "model": model,
            "system_fingerprint": system_fingerprint(model),
        }
        if self._is_chat and self._request.service_tier is not None:
            tier = self._request.service_tier
            self._head["service_tier"] = _SERVED_TIERS.get(tier, tier)
        self._role_chunk = self._chunk({"role": "assistant", "content": ""}, None, None) if self._is_chat else b""
        sample = self._chunk({"content": _PLACE} if self._is_chat else _PLACE, None, None)
        self._before, self._after = sample.rsplit(msgspec.json.encode(_PLACE), maxsplit=1)

    def _delta(self, delta: inference_pb2.Delta) -> bytes:
        if delta.logprobs:
            content: Any = {"content": delta.text} if self._is_chat else delta.text
            return self._chunk(content, self._logprobs(delta.logprobs), None)
        if not delta.text:
            return b""
        return self._before + _json_text(delta.text) + self._after

    def _finished(self, finished: inference_pb2.Finished) -> bytes:
        if finished.reason == inference_pb2.FINISH_REASON_ERROR:
            return self.error(from_status(finished.error))
        last = self._chunk({} if self._is_chat else "", None, _FINISH_REASONS.get(finished.reason, "stop"))
        if self._request.include_usage:
            last += _sse({**self._head, "choices": [], "usage": _usage(finished.usage)})
        return last + DONE

    def _chunk(self, content: Any, logprobs: Any, finish_reason: str | None) -> bytes:
        choice = {
            "index": 0,
            "delta" if self._is_chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head, "choices": [choice]}
        if self._request.include_usage:
            chunk["usage"] = None
        return _sse(chunk)

    def _whole(
        self, text: str, logprobs: Sequence[inference_pb2.TokenLogprob], finished: inference_pb2.Finished
    ) -> dict[str, Any]:
        content: Any = {"role": "assistant", "content": text, "refusal": None} if self._is_chat else text
        wanted = self._request.generate.HasField("logprobs")
        choice = {
            "index": 0,
            "message" if self._is_chat else "text": content,
            "logprobs": self._logprobs(logprobs) if wanted else None,
            "finish_reason": _FINISH_REASONS.get(finished.reason, "stop"),
        }
        head = {**self._head, "object": "chat.completion"} if self._is_chat else self._head
        return {**head, "choices": [choice], "usage": _usage(finished.usage)}

    def _logprobs(self, entries: Sequence[inference_pb2.TokenLogprob]) -> dict[str, Any]:
        return self._chat_logprobs(entries) if self._is_chat else self._completion_logprobs(entries)

    def _chat_logprobs(self, entries: Sequence[inference_pb2.TokenLogprob]) -> dict[str, Any]:
        content = [
            {**_chat_logprob(entry), "top_logprobs": [_chat_logprob(other) for other in entry.alternatives]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _completion_logprobs(self, entries: Sequence[inference_pb2.TokenLogprob]) -> dict[str, Any]:
        tokens = [_token_text(entry) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._text_offset)
            self._text_offset += len(token)
        tops = [{_token_text(other): _logprob(other) for other in entry.alternatives} for entry in entries]
        return {
            "text_offset": offsets,
            "token_logprobs": [_logprob(entry) for entry in entries],
            "tokens": tokens,
            "top_logprobs": tops if self._request.generate.logprobs else None,
        }


def models_json(models: Sequence[str], *, model: str = "", created_unix_seconds: int = 0) -> bytes:
    """The body of GET /v1/models, or of GET /v1/models/{model} when one is named.

    Raises:
        TidegateError: MODEL_NOT_FOUND.
    """
    objects = {
        name: {"id": name, "object": "model", "created": created_unix_seconds, "owned_by": "tidegate"}
        for name in models
    }
    if not model:
        return msgspec.json.encode({"object": "list", "data": list(objects.values())})
    if model not in objects:
        raise TidegateError(Reason.MODEL_NOT_FOUND, f"The model '{model}' does not exist.", field="model")
    return msgspec.json.encode(objects[model])


def system_fingerprint(model: str) -> str:
    """A stable name of what answered: it changes with the model."""
    return "fp_" + hashlib.sha256(f"tidegate:{model}".encode()).hexdigest()[:10]


def _usage(usage: inference_pb2.Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_token_count,
        "completion_tokens": usage.completion_token_count,
        "total_tokens": usage.prompt_token_count + usage.completion_token_count,
        "prompt_tokens_details": {"cached_tokens": usage.cached_token_count},
    }


def _chat_logprob(entry: inference_pb2.TokenLogprob) -> dict[str, Any]:
    text = entry.text.decode("utf-8", "replace")
    return {"token": text, "logprob": _logprob(entry), "bytes": list(entry.text)}


def _token_text(entry: inference_pb2.TokenLogprob) -> str:
    """The token's text; one that is part of a character is written as OpenAI does, so that keys stay distinct."""
    try:
        return entry.text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.text)


def _logprob(entry: inference_pb2.TokenLogprob) -> float:
    # Also true for NaN, which compares as false.
    if not entry.logprob > LOWEST_LOGPROB:
        return LOWEST_LOGPROB
    return round(entry.logprob, 7)


def _sse(value: Any) -> bytes:
    return b"data: " + _one_line(msgspec.json.encode(value)) + b"\n\n"


def _json_text(text: str) -> bytes:
    return _one_line(msgspec.json.encode(text))


def _one_line(encoded: bytes) -> bytes:
    if encoded.isascii():
        return encoded
    for raw, escaped in _LINE_BREAKS:
        encoded = encoded.replace(raw, escaped)
    return encoded
