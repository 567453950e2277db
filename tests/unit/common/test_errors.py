"""One table from a reason to every surface, and the same word on all of them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tidegate.cli.local_replies import envoy_replies, local_reply_config
from tidegate.common.errors import (
    ERROR_DOMAIN,
    LONGEST_MESSAGE_BYTES,
    SURFACES,
    Reason,
    TidegateError,
    abort,
    from_refusal,
    from_status,
    grpc_message,
    openai_body,
    openai_json,
    retry_headers,
    set_overload_status,
    to_refusal,
    to_status,
    trailing_metadata,
)
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.v1 import cache_pb2, cache_pb2_grpc, errors_pb2

CONTEXT_ERROR = TidegateError(Reason.CONTEXT_LENGTH_EXCEEDED, "9,000 tokens; the limit is 8,192", field="messages")
BUSY_ERROR = TidegateError(Reason.SERVER_IS_OVERLOADED, "the wait would be 12 s", retry_after_seconds=12.345)


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_has_a_surface_with_an_error_on_each_side(reason: Reason) -> None:
    surface = SURFACES[reason]
    assert surface.grpc_status is not grpc.StatusCode.OK
    assert 400 <= surface.http_status <= 599
    assert surface.openai_type


@pytest.fixture
def overload_is_429() -> Iterator[None]:
    set_overload_status("429")
    yield
    set_overload_status("503")


@pytest.mark.usefixtures("overload_is_429")
def test_a_refusal_for_load_may_be_429_over_http_and_is_unavailable_over_grpc_either_way() -> None:
    assert (BUSY_ERROR.surface.http_status, BUSY_ERROR.surface.grpc_status) == (429, grpc.StatusCode.UNAVAILABLE)
    assert openai_body(BUSY_ERROR)["error"]["code"] == "server_is_overloaded"
    replies = envoy_replies(body_limit_bytes=1024, tenant_retry_after_seconds=1.0)
    mappers = local_reply_config(replies)["mappers"]
    shed = [mapper for mapper in mappers if "fault_filter_abort" in json.dumps(mapper) and "status_code" in mapper]
    assert shed and {mapper["status_code"] for mapper in shed} == {429}


def test_a_refusal_for_load_has_no_other_status() -> None:
    with pytest.raises(ValueError, match="TIDEGATE_OVERLOAD_STATUS='500': expected 503 or 429"):
        set_overload_status("500")


def test_the_table_has_no_entry_without_a_reason() -> None:
    assert set(SURFACES) == set(Reason)


@pytest.mark.parametrize(
    ("reason", "grpc_status", "http_status", "openai_type"),
    [
        (Reason.INVALID_VALUE, grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
        (Reason.CONTEXT_LENGTH_EXCEEDED, grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
        (Reason.REQUEST_TOO_LARGE, grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "invalid_request_error"),
        (Reason.INVALID_API_KEY, grpc.StatusCode.UNAUTHENTICATED, 401, "invalid_request_error"),
        (Reason.MODEL_NOT_FOUND, grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error"),
        (Reason.RATE_LIMIT_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
        (Reason.SERVER_IS_OVERLOADED, grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable_error"),
        (Reason.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout_error"),
    ],
)
def test_the_documented_cases_say_what_is_documented(
    reason: Reason, grpc_status: grpc.StatusCode, http_status: int, openai_type: str
) -> None:
    surface = SURFACES[reason]
    assert (surface.grpc_status, surface.http_status, surface.openai_type) == (grpc_status, http_status, openai_type)


def test_the_openai_body_has_all_four_keys_and_null_for_no_field() -> None:
    assert openai_body(CONTEXT_ERROR) == {
        "error": {
            "message": "9,000 tokens; the limit is 8,192",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
    }
    assert openai_body(BUSY_ERROR)["error"]["param"] is None


def test_the_openai_json_fits_a_header_whatever_the_message_has() -> None:
    text = openai_json(TidegateError(Reason.INVALID_VALUE, "line\nbreak, \u00e9, \u2028, \U0001f600", field="x\r\ny"))
    assert text.isascii() and text.isprintable()
    assert json.loads(text)["error"]["param"] == "x\r\ny"


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u20ac", "\U0001f600", "%", '"'])
def test_a_huge_message_and_field_are_cut_so_that_the_metadata_stays_within_a_peers_bound(letter: str) -> None:
    error = TidegateError(Reason.UNKNOWN_PARAMETER, letter * 100_000, field=letter * 100_000)
    assert error.message.endswith("\u2026") and error.message.startswith(letter)
    told = {to_status(error).message, to_refusal(error).message, json.loads(openai_json(error))["error"]["message"]}
    assert told == {error.message}
    assert len(error.message.encode()) <= LONGEST_MESSAGE_BYTES
    metadata = [("grpc-message", grpc_message(error)), *trailing_metadata(error)]
    texts = [base64.b64encode(value) if isinstance(value, bytes) else value for _, value in metadata]
    assert sum(len(name) + len(text) + 32 for (name, _), text in zip(metadata, texts, strict=True)) < 8_192


def test_a_message_at_the_bound_is_whole() -> None:
    message = "x" * LONGEST_MESSAGE_BYTES
    assert TidegateError(Reason.INVALID_VALUE, message).message == message


def test_half_a_character_does_not_reach_a_status_that_cannot_carry_it() -> None:
    assert TidegateError(Reason.INVALID_VALUE, "no: \ud83d").message == "no: ?"


def test_what_cannot_help_says_do_not_retry() -> None:
    assert retry_headers(CONTEXT_ERROR) == [("x-should-retry", "false"), ("grpc-retry-pushback-ms", "-1")]


def test_a_time_is_told_in_whole_seconds_and_in_milliseconds_rounded_up() -> None:
    assert retry_headers(BUSY_ERROR) == [
        ("grpc-retry-pushback-ms", "12345"),
        ("retry-after", "13"),
        ("retry-after-ms", "12345"),
    ]


def test_a_short_time_is_at_least_one_whole_second() -> None:
    error = TidegateError(Reason.SERVER_IS_OVERLOADED, "busy", retry_after_seconds=0.02)
    assert dict(retry_headers(error)) == {"grpc-retry-pushback-ms": "20", "retry-after": "1", "retry-after-ms": "20"}


@pytest.mark.parametrize(("seconds", "retried"), [(60.0, True), (60.1, False)])
def test_past_a_minute_clients_are_told_not_to_retry_by_themselves(seconds: float, retried: bool) -> None:
    error = TidegateError(Reason.RATE_LIMIT_EXCEEDED, "quota", retry_after_seconds=seconds)
    pairs = dict(retry_headers(error))
    assert ("x-should-retry" not in pairs) == retried
    assert (pairs["grpc-retry-pushback-ms"] == "-1") != retried
    assert pairs["retry-after"] == str(60 if retried else 61)


def test_a_time_is_dropped_where_a_retry_makes_no_sense() -> None:
    error = TidegateError(Reason.INVALID_VALUE, "bad", retry_after_seconds=5)
    assert error.retry_after_seconds is None
    assert "retry-after" not in dict(retry_headers(error))


@pytest.mark.parametrize("error", [CONTEXT_ERROR, BUSY_ERROR], ids=["refused", "busy"])
def test_an_error_survives_the_way_between_services(error: TidegateError) -> None:
    for back in (from_refusal(to_refusal(error)), from_status(to_status(error))):
        assert (back.reason, back.message, back.field) == (error.reason, error.message, error.field)
        assert back.retry_after_seconds == error.retry_after_seconds


def test_a_brownouts_step_stands_in_a_header_and_survives_the_way_between_services() -> None:
    error = TidegateError(Reason.SERVER_IS_OVERLOADED, "not now", brownout_step=5)
    assert dict(trailing_metadata(error))["x-tidegate-brownout"] == "5"
    assert from_status(to_status(error)).brownout_step == 5
    assert "x-tidegate-brownout" not in dict(trailing_metadata(BUSY_ERROR))
    assert from_status(to_status(BUSY_ERROR)).brownout_step == 0


def test_a_reason_that_is_not_known_is_an_internal_error() -> None:
    assert from_refusal(errors_pb2.Refusal(reason="FROM_THE_FUTURE", message="m")).reason is Reason.INTERNAL_ERROR
    assert from_status(status_pb2.Status(code=3, message="m")).reason is Reason.INTERNAL_ERROR


def test_the_same_word_stands_on_every_surface() -> None:
    for reason in Reason:
        error = TidegateError(reason, "m")
        metadata = dict(trailing_metadata(error))
        info = error_details_pb2.ErrorInfo()
        assert to_status(error).details[0].Unpack(info)
        words = {info.reason, metadata["x-tidegate-reason"], openai_body(error)["error"]["code"].upper()}
        assert words == {reason.name}
        assert info.domain == ERROR_DOMAIN


def test_a_status_names_the_field_and_the_time_where_there_are_any() -> None:
    kinds = [detail.TypeName() for detail in to_status(CONTEXT_ERROR).details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
    retry = error_details_pb2.RetryInfo()
    assert to_status(BUSY_ERROR).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 12345


class RefusingServicer(cache_pb2_grpc.CacheServicer):
    """Ends every call with the same error."""

    def __init__(self, error: TidegateError) -> None:
        self.error = error

    async def LookUp(self, request: cache_pb2.LookUpRequest, context: Any) -> cache_pb2.LookUpResponse:
        await abort(context, self.error)


@pytest.fixture
async def refusing(request: pytest.FixtureRequest) -> AsyncIterator[cache_pb2_grpc.CacheAsyncStub]:
    server = Server("127.0.0.1", 0)
    cache_pb2_grpc.add_CacheServicer_to_server(RefusingServicer(request.param), server.grpc)  # type: ignore[abstract]
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield cache_pb2_grpc.CacheStub(channel)
    await server.grpc.stop(None)


@pytest.mark.parametrize("refusing", [BUSY_ERROR], indirect=True)
async def test_a_refused_call_carries_status_details_and_headers(refusing: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await refusing.LookUp(cache_pb2.LookUpRequest(), timeout=5)
    trailing = dict(caught.value.trailing_metadata() or ())
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, BUSY_ERROR.message)
    told = from_status(status_pb2.Status.FromString(trailing["grpc-status-details-bin"]))
    assert (told.reason, told.retry_after_seconds) == (Reason.SERVER_IS_OVERLOADED, 12.345)
    assert trailing["x-tidegate-reason"] == "SERVER_IS_OVERLOADED"
    assert trailing["grpc-retry-pushback-ms"] == "12345"
    assert json.loads(trailing["x-tidegate-error"])["error"]["code"] == "server_is_overloaded"
