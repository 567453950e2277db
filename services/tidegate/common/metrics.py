"""Prometheus metrics of a process: the buckets that its histograms share, and the HTTP page that shows them."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Histogram, start_http_server

TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
"""Seconds; vLLM's buckets of vllm:time_to_first_token_seconds."""

PER_TOKEN_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
"""Seconds; vLLM's buckets of the times per output token."""

REQUEST_BUCKETS: Final = (
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
    1920, 7680,
)  # fmt: skip
"""Seconds; vLLM's buckets of whole requests, with finer ones below 0.3 s, where short queues are."""

TOKEN_COUNT_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
"""Tokens a request."""


PROVIDER: Final = "tidegate"
"""OpenTelemetry's gen_ai.provider.name."""

OTEL_LABELS: Final = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "gen_ai_response_model",
)

OTEL_DURATION_BUCKETS: Final = tuple(0.01 * 2**power for power in range(14))
OTEL_TOKEN_BUCKETS: Final = tuple(4**power for power in range(14))
"""As OpenTelemetry advises; all services must agree, or their histograms cannot be added."""


class OtelRequestMetrics:
    """OpenTelemetry's metrics of whole requests, in their Prometheus form, for every service that answers some.

    Args:
        registry: where they are shown.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._durations = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From arrival, queue included, to the end.",
            (*OTEL_LABELS, "error_type"),
            buckets=OTEL_DURATION_BUCKETS,
            registry=registry,
        )
        self._tokens = Histogram(
            "gen_ai_client_token_usage_token",
            "Tokens of a request.",
            (*OTEL_LABELS, "gen_ai_token_type"),
            buckets=OTEL_TOKEN_BUCKETS,
            registry=registry,
        )

    def add_duration(self, labels: tuple[str, str, str, str], error_type: str, seconds: float) -> None:
        """Counts a request that ended; `error_type` is the reason in lower case, empty for none."""
        self._durations.labels(*labels, error_type).observe(seconds)

    def add_tokens(self, labels: tuple[str, str, str, str], prompt_token_count: int, answer_token_count: int) -> None:
        """Counts the tokens of a request that got some."""
        self._tokens.labels(*labels, "input").observe(prompt_token_count)
        self._tokens.labels(*labels, "output").observe(answer_token_count)


def otel_labels(operation: str, model: str) -> tuple[str, str, str, str]:
    """The values of OTEL_LABELS."""
    return (operation, PROVIDER, model, model)


def serve(host: str, port: int) -> None:
    """Serves the process's metrics at /metrics, from a thread of its own.

    Raises:
        OSError: the port is taken; the message has the address.
    """
    try:
        start_http_server(port, addr=host)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} for metrics: {error.strerror}") from error
