"""What clients are told by Envoy itself, when no service answered: the same errors that services give.

Envoy's own replies (unknown URL, wrong key, no healthy replica, malformed HTTP, ...) are rewritten by the list
that `local_reply_config` builds, so that they carry the reason, body, status and headers of common/errors.py.
The first entry that matches wins, and each reason stands twice: for gRPC requests, and for all others.
Refusals of the scheduler pass through here too, because Envoy counts them as its own; they stay as they are.
What a service leaves without a reason, Envoy's Lua filter says, with the replies of `lua_replies`.
"""

from __future__ import annotations

import base64
from typing import Any, Final

import msgspec

from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError, grpc_message, openai_json, trailing_metadata
from tidegate.common.shed_file import DENOMINATOR, RETRY_STEPS_SECONDS, retry_key

SCHEDULER_REPLY: Final = "response.code_details.startsWith('tidegate_')"
"""The scheduler names its replies so, in the `details` of its ImmediateResponse."""

IS_GRPC: Final = "request.headers['content-type'].startsWith('application/grpc')"
"""Also true of gRPC-Web, which the first filters have turned into gRPC."""

ONLY_GRPC: Final = frozenset({headers.ERROR_BODY, headers.HTTP_STATUS})
"""What the ingress needs to turn a gRPC reply into HTTP: a JSON request that got as far as the router is gRPC then."""

UNAVAILABLE_RETRY_SECONDS: Final = 1.0
"""A replica that died is replaced or ejected in about this time."""


class EnvoyReply(msgspec.Struct, frozen=True):
    """One kind of reply that Envoy makes.

    `condition` is a CEL expression over Envoy's attributes; the reply becomes `reason`, told with `message`.
    """

    condition: str
    reason: Reason
    message: str
    retry_after_seconds: float | None = None
    keeps_status: bool = False
    """True where the HTTP status says more than the reason's usual one."""
    lot: str = ""
    """A runtime key: those for whom the lot by its share is drawn get this reply; the others go on down the list."""


def envoy_replies(*, body_limit_bytes: int, tenant_retry_after_seconds: float) -> tuple[EnvoyReply, ...]:
    """Every reply that Envoy makes, in the order in which they are tried; the last matches all."""
    return (
        # First, because there are most of these, and each condition that is tried costs.
        *_shed_replies(),
        EnvoyReply("response.code == 401", Reason.INVALID_API_KEY, "The API key is missing or wrong."),
        EnvoyReply("response.code == 403", Reason.PERMISSION_DENIED, "This is not permitted."),
        EnvoyReply("response.code == 404", Reason.UNKNOWN_URL, "There is no such URL here."),
        EnvoyReply("response.code == 405", Reason.METHOD_NOT_ALLOWED, "This URL does not take that HTTP method."),
        EnvoyReply(
            "response.code == 413",
            Reason.REQUEST_TOO_LARGE,
            f"The request's body is larger than {body_limit_bytes} bytes.",
        ),
        EnvoyReply(
            "response.code == 415",
            Reason.UNSUPPORTED_MEDIA_TYPE,
            "The body must be JSON: send content-type application/json and no content-encoding.",
        ),
        EnvoyReply(
            "response.code == 429",
            Reason.RATE_LIMIT_EXCEEDED,
            "This tenant sends requests faster than its rate allows.",
            retry_after_seconds=tenant_retry_after_seconds,
        ),
        EnvoyReply(
            "response.code == 431",
            Reason.REQUEST_TOO_LARGE,
            "The request's headers are too large.",
            keeps_status=True,
        ),
        EnvoyReply(
            "response.code == 408 || response.code == 504",
            Reason.DEADLINE_EXCEEDED,
            "The request took too long.",
        ),
        EnvoyReply(
            "response.code == 502 || response.code == 503",
            Reason.REPLICA_UNAVAILABLE,
            "No replica can take the request now.",
            retry_after_seconds=UNAVAILABLE_RETRY_SECONDS,
        ),
        EnvoyReply(
            "response.code >= 400 && response.code < 500",
            Reason.INVALID_HTTP,
            "The request is not valid HTTP, or not what this URL takes.",
        ),
        EnvoyReply("response.code >= 500", Reason.INTERNAL_ERROR, "The request failed inside the mesh."),
    )


def _shed_replies() -> list[EnvoyReply]:
    """What is refused for the scheduler: more than it can look at, and what it would refuse anyway."""
    return [
        *_retried_later(
            "response.code_details == 'fault_filter_abort'", "More requests come than can be looked at now."
        ),
        *_retried_later(
            "response.code == 503 && response.code_details == 'local_rate_limited'",
            "This tenant asks for many times of what can be answered now.",
        ),
    ]


def _retried_later(condition: str, message: str) -> list[EnvoyReply]:
    """One for each time that the scheduler may let Envoy tell; the longest is for all whom no other was drawn for."""
    return [
        EnvoyReply(
            condition,
            Reason.SERVER_IS_OVERLOADED,
            message,
            retry_after_seconds=float(seconds),
            lot="" if seconds == RETRY_STEPS_SECONDS[-1] else retry_key(seconds),
        )
        for seconds in RETRY_STEPS_SECONDS
    ]


def lua_replies() -> dict[str, str]:
    """What Envoy's Lua filter answers over HTTP for a service that gave no reason, as Lua, by their names there."""
    return {
        "INTERNAL_ERROR": _lua_table(TidegateError(Reason.INTERNAL_ERROR, "The request failed inside the mesh.")),
        "REPLICA_UNAVAILABLE": _lua_table(
            TidegateError(
                Reason.REPLICA_UNAVAILABLE,
                "The replica stopped before it answered.",
                retry_after_seconds=UNAVAILABLE_RETRY_SECONDS,
            )
        ),
    }


def local_reply_config(replies: tuple[EnvoyReply, ...]) -> dict[str, Any]:
    """Envoy's LocalReplyConfig for these replies."""
    mappers = [_mapper(SCHEDULER_REPLY, [])]
    # Those for gRPC first: the conditions of the others hold for gRPC, too.
    mappers += [_drawn(reply, _grpc_mapper(reply)) for reply in replies]
    mappers += [_drawn(reply, _http_mapper(reply)) for reply in replies]
    return {"mappers": mappers}


def _drawn(reply: EnvoyReply, mapper: dict[str, Any]) -> dict[str, Any]:
    """The mapper, for those alone for whom its lot is drawn."""
    if not reply.lot:
        return mapper
    lot = {
        "runtime_key": reply.lot,
        "percent_sampled": {"numerator": 0, "denominator": DENOMINATOR},
        "use_independent_randomness": True,
    }
    # The lot first: most have no share, and that is soon found out.
    return mapper | {"filter": {"and_filter": {"filters": [{"runtime_filter": lot}, mapper["filter"]]}}}


def _grpc_mapper(reply: EnvoyReply) -> dict[str, Any]:
    error = _error(reply)
    status = [("grpc-status", str(error.surface.grpc_status.value[0])), ("grpc-message", grpc_message(error))]
    mapper = _mapper(f"({reply.condition}) && {IS_GRPC}", [*status, *_metadata(error)])
    # gRPC-Web, which Envoy's own replies take for plain HTTP, must not get a body that is no message.
    return mapper | {"body": {"inline_string": ""}}


def _http_mapper(reply: EnvoyReply) -> dict[str, Any]:
    error = _error(reply)
    # HTTP that is too malformed to have got an id gets one here; others have theirs written over it.
    mapper = _mapper(reply.condition, _http_fields(error), [(headers.REQUEST_ID, "%UNIQUE_ID%")]) | {
        "body": {"inline_string": openai_json(error)}
    }
    mapper["body_format_override"] = {
        "text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"},
        "content_type": "application/json",
    }
    if not reply.keeps_status:
        mapper["status_code"] = error.surface.http_status
    return mapper


def _lua_table(error: TidegateError) -> str:
    """A reply over HTTP as a table of Lua: its body and its headers, the status among them."""
    fields = [(":status", str(error.surface.http_status)), ("content-type", "application/json"), *_http_fields(error)]
    pairs = ", ".join(f"[ {_lua_text(name)} ] = {_lua_text(value)}" for name, value in fields)
    return f"{{body = {_lua_text(openai_json(error))}, headers = {{{pairs}}}}}"


def _lua_text(text: str) -> str:
    """A text between the long brackets of Lua, in which nothing is escaped."""
    assert "]]" not in text and "\\" not in text, text
    return f"[[{text}]]"


def _mapper(
    condition: str, fields: list[tuple[str, str]], substituted_fields: list[tuple[str, str]] | None = None
) -> dict[str, Any]:
    cel = "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter"
    name = "envoy.access_loggers.extension_filters.cel"
    mapper: dict[str, Any] = {
        "filter": {"extension_filter": {"name": name, "typed_config": {"@type": cel, "expression": condition}}}
    }
    # Envoy substitutes %NAME% in values, so a literal percent sign is doubled.
    literal_fields = [(name, value.replace("%", "%%")) for name, value in fields]
    mapper["headers_to_add"] = [
        {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for name, value in literal_fields + (substituted_fields or [])
    ]
    return mapper


def _http_fields(error: TidegateError) -> list[tuple[str, str]]:
    """What clients of HTTP see of it."""
    return [(name, value) for name, value in _metadata(error) if not name.startswith("grpc-") and name not in ONLY_GRPC]


def _metadata(error: TidegateError) -> list[tuple[str, str]]:
    """The metadata that a service would send, as header text."""
    return [
        (name, base64.b64encode(value).decode().rstrip("=") if isinstance(value, bytes) else value)
        for name, value in trailing_metadata(error)
    ]


def _error(reply: EnvoyReply) -> TidegateError:
    return TidegateError(reply.reason, reply.message, retry_after_seconds=reply.retry_after_seconds)
