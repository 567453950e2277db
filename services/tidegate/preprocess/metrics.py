"""What preprocess counts."""

from __future__ import annotations

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from tidegate.common.arena import ArenaUsage
from tidegate.common.metrics import TOKEN_COUNT_BUCKETS

DURATION_BUCKETS: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Seconds; a short chat takes a few tenths of a millisecond."""


class PreprocessMetrics:
    """The metrics of one preprocess process.

    Args:
        registry: where they are shown; a test has its own.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.duration = Histogram(
            "tidegate_preprocess_duration_seconds",
            "From a request's arrival to its answer, by body kind.",
            ["body_kind"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Histogram(
            "tidegate_preprocess_prompt_tokens",
            "Tokens of prepared prompts.",
            buckets=TOKEN_COUNT_BUCKETS,
            registry=registry,
        )
        self.refusals = Counter(
            "tidegate_preprocess_refusals_total", "Requests refused, by reason.", ["reason"], registry=registry
        )
        self.in_flight = Gauge("tidegate_preprocess_in_flight", "Requests under way.", registry=registry)
        self.streams = Gauge("tidegate_preprocess_streams", "Open Prepare streams.", registry=registry)
        self.arena_full = Counter(
            "tidegate_preprocess_arena_full_total", "Prompts sent on without their tokens.", registry=registry
        )
        self.arena_bytes = Gauge("tidegate_preprocess_arena_bytes", "Bytes for tensors.", registry=registry)
        self.arena_free_bytes = Gauge("tidegate_preprocess_arena_free_bytes", "Bytes not leased.", registry=registry)
        self.arena_leases = Gauge("tidegate_preprocess_arena_leases", "Live leases.", registry=registry)

    def show_arena(self, usage: ArenaUsage) -> None:
        """Shows what the arena has in use."""
        self.arena_bytes.set(usage.byte_count)
        self.arena_free_bytes.set(usage.free_byte_count)
        self.arena_leases.set(usage.lease_count)
