"""Prometheus metrics of a process: the buckets that its histograms share, and the HTTP page that shows them."""

from __future__ import annotations

from typing import Final

from prometheus_client import start_http_server

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


def serve(host: str, port: int) -> None:
    """Serves the process's metrics at /metrics, from a thread of its own.

    Raises:
        OSError: the port is taken; the message has the address.
    """
    try:
        start_http_server(port, addr=host)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} for metrics: {error.strerror}") from error
