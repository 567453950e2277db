"""What the scheduler shows of itself during a run, as a few numbers several times a second."""

from __future__ import annotations

from typing import Any

import msgspec

from tidegate.v1 import inference_pb2, scheduler_pb2


class Sample(msgspec.Struct, array_like=True):
    """The scheduler at one moment."""

    seconds: float
    """From the beginning of the run."""
    waiting: dict[str, int]
    """Requests that wait, by lane."""
    drain_rate: float
    """Requests that leave the queues, per second."""
    credits: int
    """In the scheduler's hands, not spent."""
    in_flight: int
    """Sent to replicas and not ended."""
    ready_replicas: int
    running: int
    """Answers that the engines generate."""
    brownout_step: int = 0
    """0 is none; absent from schedulers that have no ladder."""
    brownout_name: str = ""
    shed: dict[str, float] = {}
    """What Envoy refuses by lot before it asks the scheduler, by lane; 1 is all."""
    limited_tenants: int = 0
    """Tenants that Envoy holds to a rate for the scheduler."""


def from_snapshot(snapshot: scheduler_pb2.Snapshot, seconds: float) -> Sample:
    """The few numbers of a snapshot."""
    replicas = list(snapshot.replicas)
    step, name = _brownout(snapshot)
    return Sample(
        seconds=seconds,
        waiting={class_name(lane.service_class): lane.waiting_request_count for lane in snapshot.lanes},
        drain_rate=max((lane.drain_rate for lane in snapshot.lanes), default=0.0),
        credits=sum(replica.credit_count for replica in replicas),
        in_flight=sum(replica.in_flight_count for replica in replicas),
        ready_replicas=sum(replica.connected and replica.load.ready for replica in replicas),
        running=sum(replica.load.running_request_count for replica in replicas),
        brownout_step=step,
        brownout_name=name,
        shed={class_name(lane.service_class): lane.shed_share for lane in snapshot.lanes},
        limited_tenants=snapshot.limited_tenant_count,
    )


def class_name(service_class: int) -> str:
    """realtime, standard or batch."""
    return inference_pb2.ServiceClass.Name(service_class).removeprefix("SERVICE_CLASS_").lower()  # type: ignore[arg-type]


def _brownout(snapshot: Any) -> tuple[int, str]:
    """The ladder's step, as a number or as an enum, from schedulers that say it."""
    field = snapshot.DESCRIPTOR.fields_by_name.get("brownout_step")
    if field is None:
        return 0, ""
    value = int(getattr(snapshot, field.name))
    if field.enum_type is None:
        return value, ""
    return value, field.enum_type.values_by_number[value].name.removeprefix("BROWNOUT_STEP_").lower()
