"""Snapshots of several schedulers of one mesh as that of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.v1 import scheduler_pb2

_ADDED: Final = (
    "waiting_request_count",
    "waiting_token_count",
    "waiting_bytes",
    "request_limit",
    "token_limit",
    "byte_limit",
    "drain_rate",
)
"""Of a lane; each scheduler has its own."""

_ADDED_OF_REPLICA: Final = ("credit_count", "in_flight_count", "preempting_credit_count")


def together(snapshots: Sequence[scheduler_pb2.Snapshot]) -> scheduler_pb2.Snapshot:
    """One snapshot of them all, at least one: counts, bounds and rates added up, of the rest what is worst, and how
    replicas are seen by the first."""
    merged = scheduler_pb2.Snapshot()
    merged.CopyFrom(snapshots[0])
    for other in snapshots[1:]:
        merged.scheduler_id += f" {other.scheduler_id}"
        merged.brownout_step = max(merged.brownout_step, other.brownout_step)
        merged.limited_tenant_count = max(merged.limited_tenant_count, other.limited_tenant_count)
        merged.looks_for_anomalies = merged.looks_for_anomalies or other.looks_for_anomalies
        _add_lanes(merged, other)
        _add_replicas(merged, other)
        _add_totals(merged.totals, other.totals)
        known = {each.name: each for each in merged.dependencies}
        for dependency in other.dependencies:
            if not dependency.reachable:
                known[dependency.name].CopyFrom(dependency)
        flagged = {each.tenant for each in merged.flagged_tenants}
        merged.flagged_tenants.extend(each for each in other.flagged_tenants if each.tenant not in flagged)
    return merged


def _add_lanes(merged: scheduler_pb2.Snapshot, other: scheduler_pb2.Snapshot) -> None:
    for lane, others in zip(merged.lanes, other.lanes, strict=True):
        for name in _ADDED:
            setattr(lane, name, getattr(lane, name) + getattr(others, name))
        lane.tenant_count = max(lane.tenant_count, others.tenant_count)
        lane.shed_share = max(lane.shed_share, others.shed_share)
        if others.oldest_wait.ToNanoseconds() > lane.oldest_wait.ToNanoseconds():
            lane.oldest_wait.CopyFrom(others.oldest_wait)


def _add_replicas(merged: scheduler_pb2.Snapshot, other: scheduler_pb2.Snapshot) -> None:
    known = {replica.load.replica: replica for replica in merged.replicas}
    for others in other.replicas:
        replica = known.get(others.load.replica)
        if replica is None:
            merged.replicas.add().CopyFrom(others)
            continue
        for name in _ADDED_OF_REPLICA:
            setattr(replica, name, getattr(replica, name) + getattr(others, name))
        if replica.connected and not others.connected:
            replica.connected, replica.last_error = False, others.last_error


def _add_totals(totals: scheduler_pb2.Totals, others: scheduler_pb2.Totals) -> None:
    for field in totals.DESCRIPTOR.fields:
        if field.name != "refused":
            setattr(totals, field.name, getattr(totals, field.name) + getattr(others, field.name))
    for reason, count in others.refused.items():
        totals.refused[reason] += count
