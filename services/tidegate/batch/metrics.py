"""What the batch service counts. The requests themselves are counted where they are answered."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge


class BatchMetrics:
    """The metrics of one batch process.

    Args:
        registry: where they are shown; a test has its own.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.lines = Counter(
            "tidegate_batch_lines_total", "Lines whose result was kept, by outcome.", ["outcome"], registry=registry
        )
        self.refusals = Counter(
            "tidegate_batch_line_refusals_total",
            "Attempts that did not give a result, by reason; the line is tried again.",
            ["reason"],
            registry=registry,
        )
        self.ended = Counter("tidegate_batch_ended_total", "Batches that ended, by how.", ["status"], registry=registry)
        self.open = Gauge("tidegate_batch_open", "Batches that have not ended.", registry=registry)
        self.allowed = Gauge(
            "tidegate_batch_lines_allowed", "Lines that may be in flight, by the scheduler's word.", registry=registry
        )
        self.in_flight = Gauge("tidegate_batch_lines_in_flight", "Lines sent and not answered.", registry=registry)
        self.uploaded = Counter("tidegate_batch_uploaded_bytes_total", "Bytes of files kept.", registry=registry)

    def show_gate(self, *, allowed: int, in_flight: int) -> None:
        """Shows the gate as it is."""
        self.allowed.set(allowed)
        self.in_flight.set(in_flight)
