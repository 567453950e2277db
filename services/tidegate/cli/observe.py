"""One look at a running mesh: what mesh.json says, what each process says of itself, what the scheduler sees."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Literal

import grpc
import msgspec

from tidegate.cli import probes
from tidegate.cli.state import Mesh, ProcessRecord
from tidegate.common.snapshots import together
from tidegate.v1 import scheduler_pb2
from tidegate.v1.inference_pb2 import ServiceClass

Health = Literal["ok", "starting", "not serving", "unreachable", "not running"]


class ProcessView(msgspec.Struct, frozen=True, kw_only=True):
    """One process."""

    name: str
    health: Health
    address: str
    pid: int
    restart_count: int
    last_error: str
    log: str


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, as the scheduler sees it."""

    address: str
    model: str
    connected: bool
    ready: bool
    running_request_count: int
    waiting_request_count: int
    slot_count: int
    credit_count: int
    in_flight_count: int
    free_kv_block_count: int
    kv_block_count: int
    generated_tokens_per_second: float
    score: float
    breaker: str
    breaker_reason: str
    slow_start_share: float
    preempting_credit_count: int
    last_error: str


class LaneView(msgspec.Struct, frozen=True, kw_only=True):
    """One lane of the queue."""

    service_class: str
    waiting_request_count: int
    request_limit: int
    waiting_token_count: int
    oldest_wait_seconds: float
    drain_rate: float


class MeshView(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh at one moment."""

    running: bool
    phase: str
    model_name: str
    ingress: str
    processes: list[ProcessView]
    replicas: list[ReplicaView]
    lanes: list[LaneView]
    totals: dict[str, int]
    refused: dict[str, int]
    brownout_step: int
    """How much less is done for the less urgent; 0 is nothing."""
    errors: list[str]
    """What is red, and why: a line each."""


async def look(mesh: Mesh) -> MeshView:
    """Asks everything at once; whatever does not answer is told as such, never raised."""
    process_views, snapshot = await asyncio.gather(
        asyncio.gather(*(_process_view(mesh, record) for record in mesh.processes)),
        _snapshot(mesh.scheduler_addresses),
    )
    errors = [f"{each.name}: {each.health}{_because(each.last_error)}" for each in process_views if each.health != "ok"]
    if not mesh.is_running:
        errors = ["the supervisor is gone; the next `tidegate up` removes what it left"]
    replicas = [_replica_view(each) for each in snapshot.replicas] if snapshot else []
    errors += [
        f"replica {each.address}: {'not ready' if each.connected else 'not connected'}{_because(each.last_error)}"
        for each in replicas
        if not (each.connected and each.ready)
    ]
    if snapshot:
        errors += [f"{each.name}: the scheduler cannot reach it{_because(each.last_error)}"
                   for each in snapshot.dependencies if not each.reachable]  # fmt: skip
    return MeshView(
        running=mesh.is_running,
        phase=mesh.phase,
        model_name=mesh.model_name,
        ingress=mesh.addresses["ingress"],
        processes=list(process_views),
        replicas=replicas,
        lanes=[_lane_view(each) for each in snapshot.lanes] if snapshot else [],
        totals=_totals(snapshot),
        refused=dict(snapshot.totals.refused) if snapshot else {},
        brownout_step=snapshot.brownout_step if snapshot else 0,
        errors=errors,
    )


async def _process_view(mesh: Mesh, record: ProcessRecord) -> ProcessView:
    address = mesh.addresses["admin" if record.name == "envoy" else record.name]
    return ProcessView(
        name=record.name,
        health=await _health(record, address),
        address=mesh.addresses["ingress"] if record.name == "envoy" else address,
        pid=record.pid,
        restart_count=record.restart_count,
        last_error=record.last_error,
        log=record.log,
    )


async def _health(record: ProcessRecord, address: str) -> Health:
    if not record.process.is_alive:
        return "not running"
    asked: Awaitable[bool] = probes.envoy_is_live(address) if record.name == "envoy" else probes.serves(address)
    try:
        if await asked:
            return "ok"
    except (grpc.aio.AioRpcError, OSError):
        return "starting" if record.state == "starting" else "unreachable"
    return "not serving"


async def _snapshot(addresses: Sequence[str]) -> scheduler_pb2.Snapshot | None:
    """Of the schedulers that answer, as of one; None when none does."""
    asked = await asyncio.gather(*map(probes.snapshot, addresses), return_exceptions=True)
    found = [each for each in asked if isinstance(each, scheduler_pb2.Snapshot)]
    faults = [each for each in asked if isinstance(each, BaseException)]
    if unknown := [each for each in faults if not isinstance(each, grpc.aio.AioRpcError | grpc.aio.UsageError)]:
        raise unknown[0]
    return together(found) if found else None


def _replica_view(replica: scheduler_pb2.ReplicaSnapshot) -> ReplicaView:
    load = replica.load
    return ReplicaView(
        address=load.replica,
        model=load.models[0] if load.models else "",
        connected=replica.connected,
        ready=load.ready,
        running_request_count=load.running_request_count,
        waiting_request_count=load.waiting_request_count,
        slot_count=load.slot_count,
        credit_count=replica.credit_count,
        in_flight_count=replica.in_flight_count,
        free_kv_block_count=load.free_kv_block_count,
        kv_block_count=load.kv_block_count,
        generated_tokens_per_second=load.generated_tokens_per_second,
        score=replica.score,
        breaker=replica.breaker,
        breaker_reason=replica.breaker_reason,
        slow_start_share=replica.slow_start_share,
        preempting_credit_count=replica.preempting_credit_count,
        last_error=replica.last_error or load.not_ready_reason,
    )


def _lane_view(lane: scheduler_pb2.LaneSnapshot) -> LaneView:
    return LaneView(
        service_class=ServiceClass.Name(lane.service_class).removeprefix("SERVICE_CLASS_").lower(),
        waiting_request_count=lane.waiting_request_count,
        request_limit=lane.request_limit,
        waiting_token_count=lane.waiting_token_count,
        oldest_wait_seconds=lane.oldest_wait.ToMilliseconds() / 1000,
        drain_rate=lane.drain_rate,
    )


def _totals(snapshot: scheduler_pb2.Snapshot | None) -> dict[str, int]:
    if snapshot is None:
        return {}
    names = [field.name for field in snapshot.totals.DESCRIPTOR.fields if field.name != "refused"]
    return {name: getattr(snapshot.totals, name) for name in names}


def _because(error: str) -> str:
    return f" ({error})" if error else ""
