"""A request that the cache answers is logged and counted like any other."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from prometheus_client import CollectorRegistry, Histogram
from structlog.testing import capture_logs

from tidegate.cache.metrics import CacheMetrics
from tidegate.model.metrics import Metrics
from tidegate.v1 import cache_pb2, cache_pb2_grpc, inference_pb2, inference_pb2_grpc

KEY = bytes(range(32))
TIMEOUT_SECONDS = 5
CHAT = {"model": "m", "messages": [{"role": "user", "content": "capital of France?"}], "temperature": 0}
METADATA = (
    ("x-tidegate-answer-key", KEY.hex()),
    ("x-tidegate-tenant", "a"),
    ("x-tidegate-class", "batch"),
    ("x-tidegate-queue-ms", "1500.5"),
    ("x-request-id", "new-id"),
)

DURATIONS = "gen_ai_server_request_duration_seconds"
TOKENS = "gen_ai_client_token_usage_token"


async def record(channel: grpc.aio.Channel) -> None:
    answer = cache_pb2.Answer(model="m", deltas=[inference_pb2.Delta(text="Paris")])
    answer.finished.reason = inference_pb2.FINISH_REASON_STOP
    answer.finished.usage.prompt_token_count = 7
    answer.finished.usage.completion_token_count = 4
    request = cache_pb2.RecordRequest(answer_key=KEY, tenant="a", answer=answer)
    await cache_pb2_grpc.CacheStub(channel).Record(request, timeout=TIMEOUT_SECONDS)


def chat(channel: grpc.aio.Channel, body: bytes, metadata: tuple[tuple[str, str], ...] = METADATA) -> Any:
    request = httpbody_pb2.HttpBody(content_type="application/json", data=body)
    stub = inference_pb2_grpc.InferenceStub(channel)
    return stub.ChatCompletions(request, metadata=metadata, timeout=TIMEOUT_SECONDS)


def request_lines(logs: list[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [line for line in logs if line["event"] == "request"]


def otel_labels(operation: str, model: str = "m") -> dict[str, str]:
    return {
        "gen_ai_operation_name": operation,
        "gen_ai_provider_name": "tidegate",
        "gen_ai_request_model": model,
        "gen_ai_response_model": model,
    }


async def test_a_replay_has_one_log_line_with_the_model_services_fields(channel: grpc.aio.Channel) -> None:
    await record(channel)
    with capture_logs() as logs:
        assert [part async for part in chat(channel, json.dumps(CHAT).encode())]
    assert request_lines(logs) == [
        {
            "event": "request",
            "log_level": "info",
            "request_id": "new-id",
            "operation": "chat",
            "tenant": "a",
            "service_class": "batch",
            "outcome": "completed",
            "reason": "",
            "finish_reason": "stop",
            "cached": True,
            "queue_ms": 1500.5,
            "ttft_ms": 0.0,
            "total_ms": 0.0,
            "prompt_token_count": 7,
            "completion_token_count": 4,
        }
    ]


async def test_a_typed_replay_names_the_clients_own_id_too(channel: grpc.aio.Channel) -> None:
    await record(channel)
    stub = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GenerateRequest(request_id="mine", text="x")
    with capture_logs() as logs:
        assert [event async for event in stub.Generate(request, metadata=METADATA, timeout=TIMEOUT_SECONDS)]
    (line,) = request_lines(logs)
    ids = (line["request_id"], line["client_request_id"], line["operation"])
    assert ids == ("new-id", "mine", "generate_content")


async def test_a_replay_is_counted_under_the_model_services_names(
    channel: grpc.aio.Channel, registry: CollectorRegistry
) -> None:
    await record(channel)
    assert [part async for part in chat(channel, json.dumps(CHAT).encode())]
    labels = otel_labels("chat")
    assert registry.get_sample_value(f"{DURATIONS}_count", {**labels, "error_type": ""}) == 1
    assert registry.get_sample_value(f"{DURATIONS}_sum", {**labels, "error_type": ""}) == 1.5005
    tokens = [
        registry.get_sample_value(f"{TOKENS}_sum", {**labels, "gen_ai_token_type": kind})
        for kind in ("input", "output")
    ]
    assert tokens == [7, 4]


async def test_a_refused_body_is_reported_and_a_vanished_answer_is_left_to_the_replica(
    channel: grpc.aio.Channel, registry: CollectorRegistry
) -> None:
    with capture_logs() as logs:
        for body in (b"{", json.dumps(CHAT).encode()):
            with pytest.raises(grpc.aio.AioRpcError):
                await chat(channel, body).read()
    assert [(line["outcome"], line["reason"]) for line in request_lines(logs)] == [("refused", "INVALID_JSON")]
    labels = {**otel_labels("chat", model=""), "error_type": "invalid_json"}
    assert registry.get_sample_value(f"{DURATIONS}_count", labels) == 1


async def test_an_http_replay_says_how_long_it_took_with_the_queue(channel: grpc.aio.Channel) -> None:
    await record(channel)
    for queue_ms, said in (("1500.5", "1500"), ("soon", "0"), ("-3", "0"), ("inf", "0")):
        metadata = tuple((key, queue_ms if key == "x-tidegate-queue-ms" else value) for key, value in METADATA)
        call = chat(channel, json.dumps(CHAT).encode(), metadata)
        assert [part async for part in call]
        assert dict(await call.initial_metadata())["openai-processing-ms"] == said


def test_the_histograms_can_be_added_to_the_model_services() -> None:
    def shapes(registry: CollectorRegistry) -> dict[str, Any]:
        found = {}
        for collector in set(registry._collector_to_names):
            if isinstance(collector, Histogram) and collector._name in (DURATIONS, TOKENS):
                found[collector._name] = (collector._labelnames, collector._upper_bounds)
        return found

    cache_registry, model_registry = CollectorRegistry(), CollectorRegistry()
    CacheMetrics(cache_registry)
    Metrics("m", registry=model_registry)
    assert shapes(cache_registry) == shapes(model_registry)
    assert set(shapes(cache_registry)) == {DURATIONS, TOKENS}
