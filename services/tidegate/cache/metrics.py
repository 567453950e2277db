"""What the cache counts: its own state, and the requests it answers under the names that the model service has."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from tidegate.cache.memory import MemoryStore
from tidegate.common.metrics import OtelRequestMetrics, otel_labels


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
        self._requests = OtelRequestMetrics(registry)
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
        labels = otel_labels(operation, model)
        self._requests.add_duration(labels, error_type, duration_seconds)
        if model:
            self._requests.add_tokens(labels, prompt_token_count, completion_token_count)

    def show(self, store: MemoryStore) -> None:
        """Shows the state of the memory tier."""
        self.bytes.labels("memory").set(store.byte_count)
        self.answers.labels("memory").set(len(store))
        for cause, count in (("evicted", store.evicted_count), ("expired", store.expired_count)):
            self.evictions.labels("memory", cause).inc(count - self._shown[cause])
            self._shown[cause] = count
