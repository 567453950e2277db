"""What the scheduler's metrics page reads at the moment it is asked: queues, credits, replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from tidegate.scheduler.brownout import Brownout
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.lite import Lite
from tidegate.scheduler.outcomes import Outcomes
from tidegate.scheduler.request import ServiceClass
from tidegate.scheduler.shedding import Shedder
from tidegate.scheduler.tenant_limits import TenantLimits


class Gauges(Collector):
    """Reads the scheduler's state from the thread of the metrics page; single numbers, so no lock is needed."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        lite: Lite,
        outcomes: Outcomes,
        shedder: Shedder,
        limits: TenantLimits,
        brownout: Brownout,
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher = dispatcher
        self._lite = lite
        self._outcomes = outcomes
        self._shedder = shedder
        self._limits = limits
        self._brownout = brownout
        self._clock = clock

    def register(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Shows these gauges on the page."""
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The gauges now."""
        yield from self._lanes()
        yield from self._replicas()
        held = GaugeMetricFamily("tidegate_held_requests", "Requests in any stage with this scheduler.")
        held.add_metric([], self._outcomes.held_request_count)
        yield held
        shed = GaugeMetricFamily(
            "tidegate_shed_share", "What Envoy refuses before it asks here, of what comes.", labels=["class"]
        )
        for service_class, share in self._shedder.shares.items():
            shed.add_metric([service_class.label], 1 - share)
        yield shed
        limits = GaugeMetricFamily(
            "tidegate_tenant_limit",
            "Requests per second that Envoy lets through of a tenant that is nearly always refused.",
            labels=["tenant", "class"],
        )
        for key, rate in dict(self._limits.limits).items():
            limits.add_metric([key.tenant, key.class_name], rate)
        yield limits
        step = GaugeMetricFamily("tidegate_brownout_step", "How much less is done for the less urgent; 0 is nothing.")
        step.add_metric([], self._brownout.step)
        yield step

    def _lanes(self) -> Iterator[Metric]:
        requests = GaugeMetricFamily("tidegate_lane_waiting_requests", "Requests that wait.", labels=["class"])
        tokens = GaugeMetricFamily("tidegate_lane_waiting_tokens", "Tokens that wait.", labels=["class"])
        byte_counts = GaugeMetricFamily("tidegate_lane_waiting_bytes", "Bytes of bodies that wait.", labels=["class"])
        for service_class in ServiceClass:
            lane = self._dispatcher.lanes.lane(service_class)
            requests.add_metric([service_class.label], len(lane))
            tokens.add_metric([service_class.label], lane.token_count)
            byte_counts.add_metric([service_class.label], lane.byte_count)
        drain = GaugeMetricFamily("tidegate_drain_rate", "Requests per second while something waits; 0 when not known.")
        drain.add_metric([], self._dispatcher.drain.rate(self._clock()) or 0.0)
        size = GaugeMetricFamily(
            "inference_extension_flow_control_queue_size", "Alias: requests that wait in all lanes."
        )
        size.add_metric([], len(self._dispatcher.lanes))
        yield from (requests, tokens, byte_counts, drain, size)

    def _replicas(self) -> Iterator[Metric]:
        now = self._clock()
        table = self._dispatcher.table
        in_hand = GaugeMetricFamily("tidegate_credits_in_hand", "Credits to spend.", labels=["replica"])
        in_flight = GaugeMetricFamily("tidegate_in_flight_requests", "Sent there, not ended.", labels=["replica"])
        replicas = [*table, *self._lite.table]
        for replica in replicas:
            in_hand.add_metric([replica.address], replica.book.count)
            in_flight.add_metric([replica.address], replica.book.in_flight_count)
        ready = table.ready(now)
        pods = GaugeMetricFamily("inference_pool_ready_pods", "Alias: replicas to which new requests may go.")
        pods.add_metric([], len(ready))
        waiting = [replica.load.waiting_request_count for replica in ready if replica.load is not None]
        queue = GaugeMetricFamily(
            "inference_pool_average_queue_size", "Alias: requests that wait in a ready replica, on average."
        )
        queue.add_metric([], sum(waiting) / len(waiting) if waiting else 0.0)
        yield from (in_hand, in_flight, pods, queue)
