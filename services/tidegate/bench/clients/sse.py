"""OpenAI's HTTP API with server-sent events, for Tidegate and for any other server that speaks it.

While a stream runs, only its bytes are kept and their moments noted; its events are parsed once, when it has ended.
A chunk of text need not be a token, so tokens are counted by the usage at the end where the server sends one, else by
the chunks that have text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import httptools
import msgspec

from tidegate.bench.clients import http1
from tidegate.bench.clients.answer import CLASS_HEADER, Answer, Ask
from tidegate.bench.ledger import Ending
from tidegate.bench.targets import Target

_TIERS: Final = {"realtime": "priority", "standard": "default", "batch": "flex"}
_LARGEST_ERROR_BYTES: Final = 64 * 1024

_EMPTY_TEXTS: Final = (b'"content":""', b'"content": ""', b'"text":""', b'"text": ""')
_TEXTS: Final = (b'"content":', b'"text":')


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_events: Final = msgspec.json.Decoder(_Event)


class SseClient:
    """POST /v1/chat/completions (or /v1/completions) with `stream`.

    Args:
        clock: what the answers' times are taken from.
    """

    def __init__(self, target: Target, clock: Callable[[], float]) -> None:
        self._target = target
        self._clock = clock
        self.wants_text = target.http_path.endswith("/chat/completions")
        self._connections = http1.Connections(target.address)

    async def start(self) -> None:
        """Opens the first connection."""
        await self._connections.start()

    async def ask(self, ask: Ask, answer: Answer) -> None:
        """One stream to its end."""
        body, stream = msgspec.json.encode(self._body(ask)), _Stream(answer, self._clock)
        try:
            await self._connections.post(self._target.http_path, self._headers(ask), body, stream)
            stream.finish()
        except (httptools.HttpParserError, OSError) as error:
            answer.fail(f"{type(error).__name__}: {error}")
        if answer.ending is None:
            answer.fail("the stream ended without [DONE]")

    async def close(self) -> None:
        """Ends all connections."""
        self._connections.close()

    def _body(self, ask: Ask) -> dict[str, Any]:
        prompt: dict[str, Any] = (
            {"messages": [{"role": "user", "content": ask.prompt}]}
            if self.wants_text
            else {"prompt": ask.prompt.tolist()}
        )
        own = {} if self._target.is_plain_openai else {"ignore_eos": True}
        if self.wants_text and not self._target.is_plain_openai:
            own["service_tier"] = _TIERS[ask.service_class]  # type: ignore[assignment]
        return {
            **prompt,
            "model": self._target.model,
            "max_tokens": ask.max_tokens,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **own,
        }

    def _headers(self, ask: Ask) -> dict[str, str]:
        headers = {
            "content-type": "application/json",
            "x-request-timeout-ms": str(max(1, int(ask.timeout_seconds * 1000))),
            CLASS_HEADER: ask.service_class,
            **self._target.class_headers.get(ask.service_class, {}),
        }
        key = self._target.api_keys.get(ask.tenant)
        return headers | {"authorization": f"Bearer {key}"} if key else headers


class _Stream:
    """Keeps the bytes of a response and notes when they came."""

    def __init__(self, answer: Answer, clock: Callable[[], float]) -> None:
        self._answer = answer
        self._clock = clock
        self._status = 0
        self._retry_after_seconds: float | None = None
        self._chunks: list[bytes] = []
        self._byte_count = 0

    def head(self, status: int, headers: http1.Headers) -> None:
        """Accepted or not."""
        self._answer.request_id = headers.get("x-request-id", "")
        self._status = status
        self._retry_after_seconds = http1.retry_after_seconds(headers)
        if status == 200:
            self._answer.accepted = self._clock()

    def content(self, chunk: bytes) -> None:
        """A piece of the events, or of the error."""
        if self._status != 200:
            chunk = chunk[: _LARGEST_ERROR_BYTES - self._byte_count]
            self._byte_count += len(chunk)
        elif self._answer.first_token is None:
            if _has_text(chunk):
                self._answer.first_token = self._answer.last_token = self._clock()
        elif any(mark in chunk for mark in _TEXTS):
            self._answer.last_token = self._clock()
        self._chunks.append(chunk)

    def finish(self) -> None:
        """Reads what was kept."""
        content = b"".join(self._chunks)
        if self._status == 200:
            read_events(content, self._answer)
        else:
            note_error(self._status, content, self._retry_after_seconds, self._answer)


def read_events(stream: bytes, answer: Answer) -> None:
    """Notes what a whole stream of server-sent events says."""
    texts: list[str] = []
    usage: int | None = None
    finish_reason = done = None
    for line in stream.split(b"\n"):
        if not line.startswith(b"data:"):
            continue  # Comments, which say where a request waits, and the empty lines between events.
        content = line[5:].strip()
        if content == b"[DONE]":
            done = True
            continue
        try:
            event = _events.decode(content)
        except msgspec.DecodeError as error:
            answer.fail(f"an event that is no JSON: {error}")
            return
        if event.error is not None:
            _note_error_object(event.error, None, answer, count=len(texts))
            return
        usage = event.usage.completion_tokens if event.usage is not None else usage
        for choice in event.choices:
            text = choice.delta.content if choice.delta is not None else choice.text
            if text:
                texts.append(text)
            finish_reason = choice.finish_reason or finish_reason
    answer.texts = texts
    answer.token_count = len(texts) if usage is None else usage
    if not done:
        answer.fail("the stream ended without [DONE]")
    elif finish_reason is None:
        answer.fail("the stream ended without a finish_reason")
    else:
        answer.complete(usage)


def note_error(status: int, body: bytes, retry_after_seconds: float | None, answer: Answer) -> None:
    """Notes a response that is no stream."""
    try:
        error = msgspec.json.decode(body)["error"]
        assert isinstance(error, dict)
    except (msgspec.DecodeError, LookupError, TypeError, AssertionError):
        error = {"message": body.decode(errors="replace")}
    if status in (408, 504):
        answer.ending = Ending.DEADLINE_EXCEEDED
    elif status in (429, 503) and not error.get("code"):
        answer.refuse(f"HTTP_{status}", retry_after_seconds, str(error.get("message") or ""))
    elif error.get("code") and isinstance(error["code"], str):
        _note_error_object(error, retry_after_seconds, answer, count=0)
    else:
        answer.fail(f"HTTP {status}: {error.get('message')}")


def _note_error_object(error: dict[str, Any], retry_after_seconds: float | None, answer: Answer, *, count: int) -> None:
    answer.token_count = count
    answer.refuse(str(error.get("code") or "error").upper(), retry_after_seconds, str(error.get("message") or ""))


def _has_text(chunk: bytes) -> bool:
    return any(
        any(mark in event for mark in _TEXTS) and not any(mark in event for mark in _EMPTY_TEXTS)
        for event in chunk.split(b"\n\n")
    )
