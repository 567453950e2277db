"""The lines of a batch's files: what a line of the input asks for, and what is written of its end. Pure.

The shapes are OpenAI's. In: `custom_id, method, url, body`. Out: `id, custom_id, response, error`, and in a response
`status_code, request_id, body`; a line that never was a request has no response and an error of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

import msgspec

from tidegate.common.errors import TidegateError, openai_body

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions")
"""What a batch can ask for."""

LONGEST_CUSTOM_ID: Final = 512
"""Characters."""

INVALID_JSON_LINE: Final = "invalid_json_line"
LINE_TOO_LONG: Final = "line_too_long"
MISSING_FIELD: Final = "missing_required_parameter"
INVALID_VALUE: Final = "invalid_value"
INVALID_METHOD: Final = "invalid_method"
INVALID_URL: Final = "invalid_url"
DUPLICATE_CUSTOM_ID: Final = "duplicate_custom_id"
UNSUPPORTED_PARAMETER: Final = "unsupported_parameter"
BATCH_EXPIRED: Final = "batch_expired"
BATCH_CANCELLED: Final = "batch_cancelled"
"""The codes of lines that were not sent."""


class LineFault(Exception):
    """A line that cannot be sent; `custom_id` is there where the line says one."""

    def __init__(self, code: str, message: str, *, param: str = "", custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Line:
    """A request of the file."""

    custom_id: str
    body: bytes
    """JSON, as the client wrote it."""


class Usage(msgspec.Struct, frozen=True):
    """The tokens of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct):
    stream: Any = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int = 0


class _AnswerUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Answer(msgspec.Struct):
    usage: _AnswerUsage | None = None


def split(file: IO[bytes], longest_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers from 1, empty ones left out; None for one that is too long."""
    number = 0
    while piece := file.readline(longest_bytes + 1):
        number += 1
        if len(piece) > longest_bytes and not piece.endswith(b"\n"):
            while (rest := file.readline(longest_bytes + 1)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif text := piece.strip():
            yield number, text


def parse(text: bytes, endpoint: str) -> Line:
    """Reads one line.

    Raises:
        LineFault: it is no request of this batch.
    """
    try:
        line = msgspec.json.decode(text, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LineFault(INVALID_JSON_LINE, f"The line is not a JSON object: {error}.") from None
    if line.custom_id is None or line.custom_id == "":
        raise LineFault(MISSING_FIELD, "Missing required parameter: custom_id.", param="custom_id")
    if not isinstance(line.custom_id, str) or len(line.custom_id) > LONGEST_CUSTOM_ID:
        message = f"custom_id must be a text of at most {LONGEST_CUSTOM_ID} characters."
        raise LineFault(INVALID_VALUE, message, param="custom_id")
    custom_id: str = line.custom_id
    if line.method != "POST":
        raise LineFault(INVALID_METHOD, "method must be POST.", param="method", custom_id=custom_id)
    if line.url != endpoint:
        raise LineFault(INVALID_URL, f"url must be the batch's endpoint, {endpoint}.", param="url", custom_id=custom_id)
    body = bytes(line.body)
    if not body.startswith(b"{"):
        raise LineFault(MISSING_FIELD, "body must be a JSON object.", param="body", custom_id=custom_id)
    if msgspec.json.decode(body, type=_Body).stream not in (None, False):
        raise LineFault(UNSUPPORTED_PARAMETER, "A batch has no streams.", param="body.stream", custom_id=custom_id)
    return Line(custom_id, body)


def answered(line_id: str, custom_id: str, request_id: str, body: bytes) -> bytes:
    """The output line of an answer.

    Raises:
        msgspec.DecodeError: the body is not JSON.
    """
    msgspec.json.decode(body)
    # One line, whatever the answer's own spacing is.
    return _encode(line_id, custom_id, _response(200, request_id, msgspec.Raw(msgspec.json.format(body, indent=-1))))


def refused(line_id: str, custom_id: str, request_id: str, error: TidegateError) -> bytes:
    """The error line of a request that was refused."""
    return _encode(line_id, custom_id, _response(error.surface.http_status, request_id, openai_body(error)))


def not_sent(line_id: str, line_number: int, fault: LineFault) -> bytes:
    """The error line of a request that was never made; `line` says which it was, where there is no custom_id."""
    error = {"code": fault.code, "message": fault.message, "param": fault.param or None, "line": line_number}
    return _encode(line_id, fault.custom_id, None, error)


def usage_of(body: bytes) -> Usage:
    """The tokens that an answer says it took; none where it does not say."""
    try:
        usage = msgspec.json.decode(body, type=_Answer).usage
    except msgspec.DecodeError:
        usage = None
    if usage is None:
        return Usage()
    details = usage.prompt_tokens_details
    return Usage(usage.prompt_tokens, usage.completion_tokens, details.cached_tokens if details else 0)


def _response(status_code: int, request_id: str, body: Any) -> dict[str, Any]:
    return {"status_code": status_code, "request_id": request_id, "body": body}


def _encode(line_id: str, custom_id: str | None, response: Any, error: Any = None) -> bytes:
    return msgspec.json.encode({"id": line_id, "custom_id": custom_id, "response": response, "error": error})
