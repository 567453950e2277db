"""The one family of errors, and the one table that says what each means on each surface.

A service raises `TidegateError` with a reason of the table; the edge (a servicer) turns it into a gRPC status,
an HTTP status and an OpenAI error object. The OpenAI `code` is the reason in lower case, so that the same word
stands in the HTTP body, `google.rpc.ErrorInfo`, the `x-tidegate-reason` header, the log line and the metric.
"""

from __future__ import annotations

import enum
import json
import math
import os
from collections.abc import Sequence
from typing import Any, Final, NoReturn
from urllib.parse import quote

import grpc
import msgspec
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from tidegate.common import headers
from tidegate.v1 import errors_pb2

ERROR_DOMAIN: Final = "tidegate"

OVERLOAD_STATUS_VARIABLE: Final = "TIDEGATE_OVERLOAD_STATUS"
"""Of the environment, and the same in all processes of a mesh: the HTTP status of SERVER_IS_OVERLOADED."""

OVERLOAD_STATUSES: Final = (503, 429)
"""The usual one, and what gateways expect that speak the Gateway API's picker protocol."""

LONGEST_OBEYED_RETRY_SECONDS: Final = 60
"""Older clients ignore longer waits and retry within seconds, so past this they are told not to."""

RETRY_JITTER: Final = 0.5
"""A retry time is stretched by up to this share, so that those refused together do not come back together."""

LONGEST_MESSAGE_BYTES: Final = 700
"""Of a message in UTF-8. Trailing metadata says it four times over, some of them escaped, and peers bound metadata
(gRPC's default is 8 KiB): a longer one would end the call with a fault of the transport in the refusal's place."""

LONGEST_FIELD_BYTES: Final = 200
"""Of a field's name in UTF-8: an unknown one is as long as the client made it."""

ELLIPSIS: Final = "…"

BROWNOUT_STEP: Final = "brownout_step"
"""The name of the step in the metadata of google.rpc.ErrorInfo."""

_GRPC_MESSAGE_SAFE: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class Reason(enum.Enum):
    """Every reason for which a request is not answered as asked."""

    INVALID_HTTP = enum.auto()
    INVALID_JSON = enum.auto()
    INVALID_VALUE = enum.auto()
    INVALID_TYPE = enum.auto()
    MISSING_REQUIRED_PARAMETER = enum.auto()
    UNKNOWN_PARAMETER = enum.auto()
    UNSUPPORTED_PARAMETER = enum.auto()
    CONTEXT_LENGTH_EXCEEDED = enum.auto()
    REQUEST_TOO_LARGE = enum.auto()
    UNSUPPORTED_MEDIA_TYPE = enum.auto()
    INVALID_API_KEY = enum.auto()
    PERMISSION_DENIED = enum.auto()
    MODEL_NOT_FOUND = enum.auto()
    NOT_FOUND = enum.auto()
    UNKNOWN_URL = enum.auto()
    METHOD_NOT_ALLOWED = enum.auto()
    RATE_LIMIT_EXCEEDED = enum.auto()
    SERVER_IS_OVERLOADED = enum.auto()
    REPLICA_UNAVAILABLE = enum.auto()
    DEADLINE_EXCEEDED = enum.auto()
    CANCELLED = enum.auto()
    NUMERICAL_ERROR = enum.auto()
    INTERNAL_ERROR = enum.auto()


class Surface(msgspec.Struct, frozen=True):
    """What one reason is on each surface."""

    grpc_status: grpc.StatusCode
    http_status: int
    openai_type: str
    retryable: bool
    """Whether trying again can help; a time is given only where it does."""


_INVALID = Surface(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", False)

SURFACES: Final[dict[Reason, Surface]] = {
    Reason.INVALID_HTTP: _INVALID,
    Reason.INVALID_JSON: _INVALID,
    Reason.INVALID_VALUE: _INVALID,
    Reason.INVALID_TYPE: _INVALID,
    Reason.MISSING_REQUIRED_PARAMETER: _INVALID,
    Reason.UNKNOWN_PARAMETER: _INVALID,
    Reason.UNSUPPORTED_PARAMETER: _INVALID,
    Reason.CONTEXT_LENGTH_EXCEEDED: _INVALID,
    Reason.REQUEST_TOO_LARGE: Surface(grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "invalid_request_error", False),
    Reason.UNSUPPORTED_MEDIA_TYPE: Surface(grpc.StatusCode.INVALID_ARGUMENT, 415, "invalid_request_error", False),
    Reason.INVALID_API_KEY: Surface(grpc.StatusCode.UNAUTHENTICATED, 401, "invalid_request_error", False),
    Reason.PERMISSION_DENIED: Surface(grpc.StatusCode.PERMISSION_DENIED, 403, "invalid_request_error", False),
    Reason.MODEL_NOT_FOUND: Surface(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", False),
    Reason.NOT_FOUND: Surface(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", False),
    Reason.UNKNOWN_URL: Surface(grpc.StatusCode.UNIMPLEMENTED, 404, "invalid_request_error", False),
    Reason.METHOD_NOT_ALLOWED: Surface(grpc.StatusCode.UNIMPLEMENTED, 405, "invalid_request_error", False),
    Reason.RATE_LIMIT_EXCEEDED: Surface(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", True),
    Reason.SERVER_IS_OVERLOADED: Surface(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable_error", True),
    Reason.REPLICA_UNAVAILABLE: Surface(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable_error", True),
    Reason.DEADLINE_EXCEEDED: Surface(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout_error", False),
    Reason.CANCELLED: Surface(grpc.StatusCode.CANCELLED, 499, "invalid_request_error", False),
    Reason.NUMERICAL_ERROR: Surface(grpc.StatusCode.INTERNAL, 500, "server_error", False),
    Reason.INTERNAL_ERROR: Surface(grpc.StatusCode.INTERNAL, 500, "server_error", False),
}


def set_overload_status(text: str) -> None:
    """Sets the HTTP status of SERVER_IS_OVERLOADED in this process.

    Raises:
        ValueError: it is neither of the two.
    """
    if text not in map(str, OVERLOAD_STATUSES):
        raise ValueError(f"{OVERLOAD_STATUS_VARIABLE}={text!r}: expected 503 or 429")
    usual = SURFACES[Reason.SERVER_IS_OVERLOADED]
    SURFACES[Reason.SERVER_IS_OVERLOADED] = msgspec.structs.replace(usual, http_status=int(text))


set_overload_status(os.environ.get(OVERLOAD_STATUS_VARIABLE, "503"))


class TidegateError(Exception):
    """A request that is not answered as asked, and why.

    Args:
        reason: an entry of the table.
        message: one sentence for a person, with the numbers; the end of a long one is left out.
        field: the field at fault, as the client wrote it (`messages[0].role`); empty for none, and bounded too.
        retry_after_seconds: when to try again; None where the reason does not make sense to retry.
        brownout_step: the step of the brownout that refuses the request; 0 for none.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str = "",
        retry_after_seconds: float | None = None,
        brownout_step: int = 0,
    ) -> None:
        self.reason = reason
        self.message = _shortened(message, LONGEST_MESSAGE_BYTES)
        self.field = _shortened(field, LONGEST_FIELD_BYTES)
        super().__init__(self.message)
        self.retry_after_seconds = retry_after_seconds if SURFACES[reason].retryable else None
        self.brownout_step = brownout_step

    @property
    def surface(self) -> Surface:
        """What this error is on each surface."""
        return SURFACES[self.reason]

    @property
    def code(self) -> str:
        """OpenAI's `code`: the reason in lower case."""
        return self.reason.name.lower()


def to_refusal(error: TidegateError) -> errors_pb2.Refusal:
    """The error as services tell it to each other."""
    refusal = errors_pb2.Refusal(reason=error.reason.name, message=error.message, field=error.field)
    if error.retry_after_seconds is not None:
        refusal.retry_after.FromMilliseconds(math.ceil(error.retry_after_seconds * 1000))
    return refusal


def from_refusal(refusal: errors_pb2.Refusal) -> TidegateError:
    """The error that another service told; an unknown reason is INTERNAL_ERROR."""
    reason = Reason.__members__.get(refusal.reason, Reason.INTERNAL_ERROR)
    retry = refusal.retry_after.ToMilliseconds() / 1000 if refusal.HasField("retry_after") else None
    return TidegateError(reason, refusal.message, field=refusal.field, retry_after_seconds=retry)


def openai_body(error: TidegateError) -> dict[str, Any]:
    """OpenAI's error object: all four keys, strings or null."""
    return {
        "error": {
            "message": error.message,
            "type": error.surface.openai_type,
            "param": error.field or None,
            "code": error.code,
        }
    }


def openai_json(error: TidegateError) -> str:
    """OpenAI's error object as ASCII JSON on one line, fit for a header."""
    return json.dumps(openai_body(error), ensure_ascii=True)


def retry_headers(error: TidegateError) -> list[tuple[str, str]]:
    """What stock clients obey: whole seconds, milliseconds, and whether to retry at all."""
    seconds = error.retry_after_seconds
    if seconds is None or seconds > LONGEST_OBEYED_RETRY_SECONDS:
        pairs = [("x-should-retry", "false"), ("grpc-retry-pushback-ms", "-1")]
    else:
        pairs = [("grpc-retry-pushback-ms", str(math.ceil(seconds * 1000)))]
    if seconds is not None:
        pairs += [("retry-after", str(max(1, math.ceil(seconds)))), ("retry-after-ms", str(math.ceil(seconds * 1000)))]
    return pairs


def refusal_headers(error: TidegateError) -> list[tuple[str, str]]:
    """What every refusal says of itself, on whichever surface: its reason, a brownout's step, and when to retry."""
    step = [(headers.BROWNOUT, str(error.brownout_step))] if error.brownout_step else []
    return [(headers.REASON, error.reason.name), *step, *retry_headers(error)]


def grpc_message(error: TidegateError) -> str:
    """The message as the header grpc-message has it: printable ASCII, all else percent-encoded."""
    return quote(error.message, safe=_GRPC_MESSAGE_SAFE)


def to_status(error: TidegateError) -> status_pb2.Status:
    """The error as google.rpc.Status with ErrorInfo, BadRequest and RetryInfo as they apply."""
    info = error_details_pb2.ErrorInfo(reason=error.reason.name, domain=ERROR_DOMAIN)
    if error.brownout_step:
        info.metadata[BROWNOUT_STEP] = str(error.brownout_step)
    details: list[Any] = [info]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        any_message = any_pb2.Any()
        any_message.Pack(detail)
        packed.append(any_message)
    return status_pb2.Status(code=error.surface.grpc_status.value[0], message=error.message, details=packed)


def from_status(status: status_pb2.Status) -> TidegateError:
    """The error that a status tells; one without a known reason is INTERNAL_ERROR."""
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, request, retry):
            detail.Unpack(message)
    reason = Reason.__members__.get(info.reason, Reason.INTERNAL_ERROR)
    field = request.field_violations[0].field if request.field_violations else ""
    seconds = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    step = info.metadata.get(BROWNOUT_STEP, "")
    return TidegateError(
        reason,
        status.message,
        field=field,
        retry_after_seconds=seconds,
        brownout_step=int(step) if step.isdecimal() else 0,
    )


def trailing_metadata(error: TidegateError) -> Sequence[tuple[str, str | bytes]]:
    """Everything a refused gRPC call carries beside its status."""
    return [
        ("grpc-status-details-bin", to_status(error).SerializeToString()),
        (headers.ERROR_BODY, openai_json(error)),
        (headers.HTTP_STATUS, str(error.surface.http_status)),
        *refusal_headers(error),
    ]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TidegateError) -> NoReturn:
    """Ends a call with the error; the only place where a servicer does so."""
    await context.abort(error.surface.grpc_status, error.message, tuple(trailing_metadata(error)))
    raise AssertionError("abort does not return")


def _shortened(text: str, byte_limit: int) -> str:
    """The text, or its beginning with an ellipsis, in at most so many bytes of UTF-8."""
    # A client's JSON can hold half a character, which no status could carry.
    encoded = text.encode(errors="replace")
    if len(encoded) <= byte_limit:
        return encoded.decode()
    return encoded[: byte_limit - len(ELLIPSIS.encode())].decode(errors="ignore") + ELLIPSIS
