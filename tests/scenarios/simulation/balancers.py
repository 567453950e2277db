"""What Envoy does by itself, and what Tidegate is compared with: round robin, least request, power of two choices.

Each sees what a proxy sees, the requests that it sent and that have not ended, and nothing of an engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from simulation.replica import SimulatedReplica
from simulation.simulator import Simulator

Order = Callable[[Sequence[SimulatedReplica]], list[SimulatedReplica]]


class Balancer:
    """One rule; `order` gives the replicas, the chosen one first, the others for a retry."""

    def __init__(self, order: Order) -> None:
        self.order = order

    @classmethod
    def round_robin(cls, simulator: Simulator) -> Balancer:
        """Each in turn."""
        turns = itertools.count()

        def order(replicas: Sequence[SimulatedReplica]) -> list[SimulatedReplica]:
            turn = next(turns) % len(replicas)
            return [*replicas[turn:], *replicas[:turn]]

        return cls(order)

    @classmethod
    def least_request(cls, simulator: Simulator) -> Balancer:
        """The one with the fewest requests under way; among equal ones any."""
        return cls(lambda replicas: sorted(replicas, key=lambda one: (one.busy_count, simulator.random.random())))

    @classmethod
    def power_of_two(cls, simulator: Simulator) -> Balancer:
        """The better of two that chance picked."""

        def order(replicas: Sequence[SimulatedReplica]) -> list[SimulatedReplica]:
            shuffled = simulator.random.sample(list(replicas), len(replicas))
            return [*sorted(shuffled[:2], key=lambda one: one.busy_count), *shuffled[2:]]

        return cls(order)
