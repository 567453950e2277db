"""Envoy's external processing messages, from and to what the scheduler thinks in. Pure, but for Envoy's protobuf."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Final

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from tidegate.common import headers
from tidegate.common.errors import TidegateError, grpc_message, openai_json, refusal_headers, to_status
from tidegate.scheduler.pipeline import Decision
from tidegate.scheduler.request import Request
from tidegate.scheduler.shedding import LONGEST_DELAY_SECONDS

_OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

CONTINUE_HEADERS: Final = ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
CONTINUE_BODY: Final = ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse())


def header_fields(message: ext_proc.HttpHeaders) -> Mapping[str, str]:
    """The headers of a request by name; of a name that is there twice, the last. Values are read as Latin-1."""
    return {
        header.key: header.raw_value.decode("latin-1") if header.raw_value else header.value
        for header in message.headers.headers
    }


def delay_seconds(fields: Mapping[str, str], header: str, unix_now: float) -> float:
    """How long ago the moment of a header was; 0 where that is not known, or where the clocks differ by more."""
    try:
        delay = unix_now - float(fields.get(header, ""))
    except ValueError:
        return 0.0
    return delay if 0 <= delay <= LONGEST_DELAY_SECONDS else 0.0


def hold(seconds: float) -> ext_proc.ProcessingResponse:
    """Tells Envoy to wait so long for the answer of this phase, instead of its message_timeout."""
    response = ext_proc.ProcessingResponse()
    response.override_message_timeout.FromMilliseconds(int(seconds * 1000))
    return response


def go_on(decision: Decision, *, in_headers: bool) -> ext_proc.ProcessingResponse:
    """Lets the request go on with the decision's headers."""
    common = ext_proc.CommonResponse(
        header_mutation=_mutation(decision.header_fields), clear_route_cache=decision.changes_route
    )
    if in_headers:
        return ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse(response=common))
    return ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse(response=common))


def refuse(error: TidegateError, request: Request) -> ext_proc.ProcessingResponse:
    """Answers the client instead of the mesh: an OpenAI error over HTTP, a status with details over gRPC."""
    fields = refusal_headers(error)
    if request.is_grpc:
        # Envoy would write these by itself for gRPC, but takes gRPC-Web for plain HTTP.
        fields += [
            ("grpc-status", str(error.surface.grpc_status.value[0])),
            ("grpc-message", grpc_message(error)),
            ("grpc-status-details-bin", base64.b64encode(to_status(error).SerializeToString()).rstrip(b"=").decode()),
            # For a request that came in as HTTP; the ingress takes these two from all other responses.
            (headers.ERROR_BODY, openai_json(error)),
            (headers.HTTP_STATUS, str(error.surface.http_status)),
        ]
    else:
        fields.append(("content-type", "application/json"))
    response = ext_proc.ImmediateResponse(
        headers=_mutation(fields),
        body=b"" if request.is_grpc else openai_json(error).encode(),
        details=f"tidegate_{error.code}",
    )
    response.status.code = error.surface.http_status
    if request.is_grpc:
        response.grpc_status.status = error.surface.grpc_status.value[0]
    return ext_proc.ProcessingResponse(immediate_response=response)


def _mutation(fields: Iterable[tuple[str, str]]) -> ext_proc.HeaderMutation:
    return ext_proc.HeaderMutation(
        set_headers=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=name, raw_value=value.encode("latin-1", "replace")),
                append_action=_OVERWRITE,
            )
            for name, value in fields
        ]
    )
