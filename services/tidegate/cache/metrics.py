"""What the cache counts: its own state, and the requests it answers under the names that the model service has."""

from __future__ import annotations

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from tidegate.cache.memory import MemoryStore

PROVIDER: Final = "tidegate"

# OpenTelemetry advises these; all services must agree, or their histograms cannot be added.
OTEL_DURATION_BUCKETS: Final = tuple(0.01 * 2**power for power in range(14))
OTEL_TOKEN_BUCKETS: Final = tuple(4**power for power in range(14))

_OTEL_LABELS: Final = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "gen_ai_response_model",
)


class CacheMetrics:
    """The metrics of one cache process.

    Args:
        registry: where they are shown; a test has its own.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.hits = Counter("tidegate_cache_hits_total", "Answers found, by tier.", ["tier"], registry=registry)
        self.misses = Counter("tidegate_cache_misses_total", "Answers not found.", ["tier"], registry=registry)
        self.failures = Counter(
            "tidegate_cache_failures_total",
            "Calls that a tier failed or was too slow for; each is a miss.",
            ["tier", "cause"],
            registry=registry,
        )
        self.evictions = Counter(
            "tidegate_cache_evictions_total", "Answers that left, by cause.", ["tier", "cause"], registry=registry
        )
        self.bytes = Gauge("tidegate_cache_bytes", "Bytes in use, keys included.", ["tier"], registry=registry)
        self.capacity = Gauge("tidegate_cache_capacity_bytes", "The bound on bytes.", ["tier"], registry=registry)
        self.answers = Gauge("tidegate_cache_answers", "Answers kept.", ["tier"], registry=registry)
        self.records = Counter(
            "tidegate_cache_records_total", "Answers offered, by what became of them.", ["outcome"], registry=registry
        )
        self.replays = Counter(
            "tidegate_cache_replays_total", "Replays, by how they ended.", ["outcome"], registry=registry
        )
        self._durations = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From arrival, queue included, to the end.",
            (*_OTEL_LABELS, "error_type"),
            buckets=OTEL_DURATION_BUCKETS,
            registry=registry,
        )
        self._tokens = Histogram(
            "gen_ai_client_token_usage_token",
            "Tokens of a request.",
            (*_OTEL_LABELS, "gen_ai_token_type"),
            buckets=OTEL_TOKEN_BUCKETS,
            registry=registry,
        )
        self._shown = {"evicted": 0, "expired": 0}

    def add_request(
        self,
        *,
        operation: str,
        model: str,
        error_type: str,
        duration_seconds: float,
        prompt_token_count: int,
        completion_token_count: int,
    ) -> None:
        """Counts a request that ended here.

        Args:
            model: the one that gave the answer; empty when nothing was replayed, and then no tokens are counted.
            error_type: the reason in lower case; empty for none.
        """
        labels = (operation, PROVIDER, model, model)
        self._durations.labels(*labels, error_type).observe(duration_seconds)
        if model:
            self._tokens.labels(*labels, "input").observe(prompt_token_count)
            self._tokens.labels(*labels, "output").observe(completion_token_count)

    def show(self, store: MemoryStore) -> None:
        """Shows the state of the memory tier."""
        self.bytes.labels("memory").set(store.byte_count)
        self.answers.labels("memory").set(len(store))
        for cause, count in (("evicted", store.evicted_count), ("expired", store.expired_count)):
            self.evictions.labels("memory", cause).inc(count - self._shown[cause])
            self._shown[cause] = count
