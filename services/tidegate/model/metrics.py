"""Every metric of the model service, by its public name; vLLM's and OpenTelemetry's where there is one.

vLLM's names carry labels `model_name` and `engine`, OpenTelemetry's its own attributes. Counting happens per chunk
of a stream or at a request's end, never in a token's loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tidegate.common.metrics import (
    OTEL_LABELS,
    PER_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    TOKEN_COUNT_BUCKETS,
    TTFT_BUCKETS,
    OtelRequestMetrics,
    otel_labels,
)
from tidegate.model.call import Record
from tidegate.model.load import ReplicaLoad
from tidegate.model.slots import Slots
from tidegate.v1 import replica_pb2

OTEL_FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
)  # fmt: skip
OTEL_PER_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)

OUTCOME_WORDS: Final = {
    replica_pb2.REQUEST_OUTCOME_COMPLETED: "completed",
    replica_pb2.REQUEST_OUTCOME_CANCELLED: "cancelled",
    replica_pb2.REQUEST_OUTCOME_DEADLINE_EXCEEDED: "deadline_exceeded",
    replica_pb2.REQUEST_OUTCOME_REFUSED: "refused",
    replica_pb2.REQUEST_OUTCOME_FAILED: "failed",
}
"""The closed set: the same words in the log line, the metric and the report."""

ENGINE_LABEL: Final = "0"
"""vLLM numbers the engines of a process; there is one."""


class Metrics:
    """What is counted of requests and tokens.

    Args:
        vllm_names: whether to publish under vLLM's names too.
    """

    def __init__(self, model_name: str, *, vllm_names: bool = True, registry: CollectorRegistry = REGISTRY) -> None:
        self._model_name = model_name
        self._vllm = _VllmMetrics(model_name, registry) if vllm_names else None
        self._otel = _OtelMetrics(model_name, registry)
        self._requests = Counter(
            "tidegate_requests", "Requests that ended, by outcome and reason.", ("outcome", "reason"), registry=registry
        )
        self._resumes = Counter("tidegate_resumes", "Streams that went on after their engine broke.", registry=registry)
        self._fail_open = Counter(
            "tidegate_fail_open_requests", "Requests that began without a scheduler's credit.", registry=registry
        )
        self._records_dropped = Counter(
            "tidegate_answer_records_dropped", "Answers not sent to the cache.", ("cause",), registry=registry
        )

    def add_tokens(self, count: int, gap_seconds: float | None) -> None:
        """Counts new tokens of one stream and the time since those before."""
        if self._vllm is not None:
            self._vllm.add_tokens(count, gap_seconds)

    def drop_record(self, cause: str) -> None:
        """Counts an answer that the cache will not get."""
        self._records_dropped.labels(cause).inc()

    def add_request(self, record: Record) -> None:
        """Counts a request that ended; its record is complete."""
        self._requests.labels(OUTCOME_WORDS[record.outcome], record.reason).inc()
        if record.slot_at is not None and not record.credit_id:
            self._fail_open.inc()
        if record.resumed_count:
            self._resumes.inc(record.resumed_count)
        self._otel.add_request(record)
        if self._vllm is not None:
            self._vllm.add_request(record)


class _VllmMetrics:
    """The same figures under the names that vLLM's users know."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        labels = ("model_name", "engine")

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            metric = Histogram(
                f"vllm:{name}", f"{text} (vLLM's name for it.)", labels, buckets=tuple(buckets), registry=registry
            )
            return metric.labels(model_name, ENGINE_LABEL)

        def counter(name: str, text: str) -> Counter:
            metric = Counter(f"vllm:{name}", f"{text} (vLLM's name for it.)", labels, registry=registry)
            return metric.labels(model_name, ENGINE_LABEL)

        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._tokens = _TokenFigures(model_name)
        registry.register(self._tokens)
        self._success = Counter(
            "vllm:request_success",
            "Requests that were answered. (vLLM's name for it.)",
            (*labels, "finished_reason"),
            registry=registry,
        )
        self._success_labels = (model_name, ENGINE_LABEL)
        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "A request's mean time per token.", PER_TOKEN_BUCKETS
        )
        self._duration = histogram("e2e_request_latency_seconds", "From arrival to the end.", REQUEST_BUCKETS)
        self._queue = histogram(
            "request_queue_time_seconds", "In the scheduler's queue and for a slot.", REQUEST_BUCKETS
        )
        self._inference = histogram("request_inference_time_seconds", "From the slot to the end.", REQUEST_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "From the slot to the first token.", REQUEST_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "From first to last token.", REQUEST_BUCKETS)
        self._prompt_count = histogram("request_prompt_tokens", "A request's prompt tokens.", TOKEN_COUNT_BUCKETS)
        self._answer_count = histogram("request_generation_tokens", "A request's new tokens.", TOKEN_COUNT_BUCKETS)
        self._max_tokens = histogram("request_params_max_tokens", "A request's bound.", TOKEN_COUNT_BUCKETS)

    def add_tokens(self, count: int, gap_seconds: float | None) -> None:
        self._tokens.add(count, gap_seconds)

    def add_request(self, record: Record) -> None:
        ended_at = record.ended_at if record.ended_at is not None else record.arrived_at
        if record.outcome == replica_pb2.REQUEST_OUTCOME_COMPLETED:
            self._success.labels(*self._success_labels, record.finish_reason).inc()
        if record.slot_at is None or record.first_token_at is None or record.last_token_at is None:
            return
        new_token_count = record.completion_token_count - record.prior_token_count
        self._prompt_tokens.inc(record.prompt_token_count)
        self._first_token.observe(record.first_token_at - record.arrived_at + record.queue_seconds)
        if new_token_count > 1:
            self._per_token.observe((record.last_token_at - record.first_token_at) / (new_token_count - 1))
        self._duration.observe(ended_at - record.arrived_at + record.queue_seconds)
        prepared_at = record.prepared_at if record.prepared_at is not None else record.arrived_at
        self._queue.observe(max(0.0, record.slot_at - prepared_at) + record.queue_seconds)
        self._inference.observe(max(0.0, ended_at - record.slot_at))
        self._prefill.observe(max(0.0, record.first_token_at - record.slot_at))
        self._decode.observe(record.last_token_at - record.first_token_at)
        self._prompt_count.observe(record.prompt_token_count)
        self._answer_count.observe(max(0, new_token_count))
        self._max_tokens.observe(record.max_tokens)


class _TokenFigures(Collector):
    """What is counted with every chunk of every stream: plain numbers, which cost a tenth of Prometheus' own."""

    def __init__(self, model_name: str) -> None:
        self._labels = (model_name, ENGINE_LABEL)
        self._token_count = 0
        self._gap_counts = [0] * (len(PER_TOKEN_BUCKETS) + 1)
        self._gap_sum_seconds = 0.0

    def add(self, count: int, gap_seconds: float | None) -> None:
        """Counts tokens that came together, and the time since those before."""
        self._token_count += count
        if gap_seconds is not None and count:
            gap_seconds /= count
            self._gap_counts[bisect_left(PER_TOKEN_BUCKETS, gap_seconds)] += count
            self._gap_sum_seconds += gap_seconds * count

    def collect(self) -> Iterator[Metric]:
        names = ("model_name", "engine")
        tokens = CounterMetricFamily("vllm:generation_tokens", "Tokens generated. (vLLM's name for it.)", labels=names)
        tokens.add_metric(self._labels, self._token_count)
        yield tokens
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between tokens of a stream. (vLLM's name for it.)", labels=names
        )
        bounds = [*(str(float(bound)) for bound in PER_TOKEN_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._gap_counts), strict=True))
        gaps.add_metric(self._labels, buckets, self._gap_sum_seconds)
        yield gaps


class _OtelMetrics:
    """OpenTelemetry's server metrics of generative AI, in their Prometheus form."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model_name = model_name
        self._requests = OtelRequestMetrics(registry)
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From arrival, queue included, to the first token.",
            OTEL_LABELS,
            buckets=OTEL_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            OTEL_LABELS,
            buckets=OTEL_PER_TOKEN_BUCKETS,
            registry=registry,
        )

    def add_request(self, record: Record) -> None:
        labels = otel_labels(record.operation, self._model_name)
        ended_at = record.ended_at if record.ended_at is not None else record.arrived_at
        duration_seconds = ended_at - record.arrived_at + record.queue_seconds
        self._requests.add_duration(labels, record.reason.lower(), duration_seconds)
        if record.first_token_at is None or record.last_token_at is None:
            return
        self._first_token.labels(*labels).observe(record.first_token_at - record.arrived_at + record.queue_seconds)
        new_token_count = record.completion_token_count - record.prior_token_count
        if new_token_count > 1:
            mean = (record.last_token_at - record.first_token_at) / (new_token_count - 1)
            self._per_token.labels(*labels).observe(mean)
        self._requests.add_tokens(labels, record.prompt_token_count, new_token_count)


class StateCollector(Collector):
    """Gauges read at the moment of a scrape: the engine's load, the slots and the credits."""

    def __init__(self, model_name: str, load: ReplicaLoad, slots: Slots, *, vllm_names: bool = True) -> None:
        self._model_name = model_name
        self._load = load
        self._slots = slots
        self._vllm_names = vllm_names

    def collect(self) -> Iterator[Metric]:
        """Reads everything anew."""
        ledger = self._slots.ledger
        yield from (
            GaugeMetricFamily("tidegate_slots", "Sequences that the engine runs at once.", ledger.slot_count),
            GaugeMetricFamily("tidegate_slots_used", "Requests that have a slot.", ledger.running_count),
            GaugeMetricFamily("tidegate_credits_granted", "Credits out and not spent.", ledger.granted_count),
            GaugeMetricFamily(
                "tidegate_preempting_credits_granted", "Preempting credits out and not spent.", ledger.preempting_count
            ),
            GaugeMetricFamily("tidegate_slots_paused", "Batch requests paused for realtime ones.", ledger.paused_count),
            GaugeMetricFamily(
                "tidegate_credits_ahead", "Credits that may stand above the slots.", self._load.ahead_count
            ),
            GaugeMetricFamily(
                "tidegate_credit_gap_seconds",
                "From a freed slot's credit to the request that spent it, while requests wait.",
                self._load.look_ahead.gap_seconds or 0.0,
            ),
            GaugeMetricFamily(
                "tidegate_fail_open_waiting", "Requests without a credit that wait for a slot.", ledger.waiting_count
            ),
            GaugeMetricFamily("tidegate_schedulers", "Connected schedulers.", len(self._slots.sessions)),
        )
        if self._vllm_names:
            yield from self._vllm_state()

    def _vllm_state(self) -> Iterator[Metric]:
        # Scrapes come in a thread of their own; the snapshot is never changed once it is made.
        load = self._load.latest
        used = 1 - load.free_kv_block_count / load.kv_block_count if load.kv_block_count else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that generate.", load.running_request_count),
            ("num_requests_waiting", "Requests that wait in the engine or for a slot.", load.waiting_request_count),
            ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", f"{text} (vLLM's name for it.)", labels=("model_name", "engine"))
            gauge.add_metric((self._model_name, ENGINE_LABEL), value)
            yield gauge
        preemptions = CounterMetricFamily(
            "vllm:num_preemptions",
            "Sequences that lost their KV blocks to others. (vLLM's name for it.)",
            labels=("model_name", "engine"),
        )
        preemptions.add_metric((self._model_name, ENGINE_LABEL), self._load.preemption_count)
        yield preemptions
        for name, text in (("queries", "Prompt tokens looked up"), ("hits", "Prompt tokens found")):
            reuse = CounterMetricFamily(
                f"vllm:prefix_cache_{name}",
                f"{text} among computed prefixes; 0, as the engine reuses none yet. (vLLM's name for it.)",
                labels=("model_name", "engine"),
            )
            reuse.add_metric((self._model_name, ENGINE_LABEL), 0)
            yield reuse
        info = InfoMetricFamily(
            "vllm:cache_config", "The KV cache. (vLLM's name for it.)", labels=("model_name", "engine")
        )
        config: dict[str, Any] = {
            "block_size": str(load.kv_block_token_count),
            "num_gpu_blocks": str(load.kv_block_count),
        }
        info.add_metric((self._model_name, ENGINE_LABEL), config)
        yield info
