"""How many lines may be in flight, by what the scheduler last said. Pure.

Invariants: nothing is added while a request of another class waits, and never more than the credits that are left when
the reserve and the batch lane have theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.v1 import inference_pb2, scheduler_pb2

URGENT = frozenset({inference_pb2.SERVICE_CLASS_REALTIME, inference_pb2.SERVICE_CLASS_STANDARD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The settings that the decision needs; see config.py."""

    in_flight_limit: int
    urgent_waiting_limit: int
    reserved_credit_count: int


def allowed_in_flight(snapshot: scheduler_pb2.Snapshot, in_flight: int, bounds: Bounds) -> int:
    """How many lines may be in flight until the next snapshot; those that are stay, whatever it says.

    A line that ends gives its credit back, so another one may take its place: the answer is a level, not an increment.

    Args:
        in_flight: lines sent and not answered when the snapshot came.
    """
    waiting = {lane.service_class: lane.waiting_request_count for lane in snapshot.lanes}
    if sum(count for service_class, count in waiting.items() if service_class in URGENT) > bounds.urgent_waiting_limit:
        return 0
    credit_count = sum(replica.credit_count for replica in snapshot.replicas if replica.connected)
    # Where all capacity is one request's, a reserve would be all of it.
    reserve = min(bounds.reserved_credit_count, max(0, credit_count + in_flight - 1))
    spare = credit_count - reserve - waiting.get(inference_pb2.SERVICE_CLASS_BATCH, 0)
    allowed = min(bounds.in_flight_limit, in_flight + spare)
    if allowed < 1 and not credit_count and not any(waiting.values()) and _free_slot_count(snapshot) > 0:
        # Credits come by demand, and who sends nothing shows none: one line asks.
        return 1
    return max(0, allowed)


def _free_slot_count(snapshot: scheduler_pb2.Snapshot) -> int:
    loads = [replica.load for replica in snapshot.replicas if replica.connected and replica.load.ready]
    return sum(max(0, load.slot_count - load.running_request_count - load.waiting_request_count) for load in loads)
