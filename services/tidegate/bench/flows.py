"""What a load is made of: flows, each one kind of traffic, put on top of each other.

A flow says who sends (tenants by weight, one class), when (arrivals, from `begin_seconds` for `duration_seconds`),
what (lengths), and how its clients behave (deadline, patience, retries, leaving). A load is a name and its flows; from
it and a seed the plan is made (plan.py). Everything here is data, so that a scenario is a declaration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from tidegate.bench.arrivals import Arrivals, Bursts, Constant, Poisson, Square
from tidegate.bench.lengths import ConstantLength, Lengths

ServiceClassName = Literal["realtime", "standard", "batch"]
RetryPolicy = Literal["none", "naive", "obedient"]

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of traffic."""

    name: str
    arrivals: Arrivals
    begin_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    duration_seconds: _Positive = 60.0
    tenants: Mapping[str, float] = msgspec.field(default_factory=lambda: {"default": 1.0})
    """Each tenant's weight: its share of the flow's requests."""
    service_class: ServiceClassName = "standard"
    prompt_tokens: Lengths = ConstantLength(128)
    answer_tokens: Lengths = ConstantLength(64)
    deadline_seconds: _Positive = 10.0
    """From the planned time to the last token; later is not in time."""
    patience_seconds: _Positive | None = None
    """How long a client waits for an answer; absent, as long as its deadline. With more, late answers are seen."""
    retries: RetryPolicy = "none"
    leave_share: _Share = 0.0
    """This share of the clients leaves at a random moment."""
    leave_within_seconds: _Positive | None = None
    """Of so many seconds after the planned time; absent, within the deadline."""
    shared_prefix_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """So many tokens at the beginning of a tenant's prompts are always the same, as a system message is."""

    @property
    def waits_seconds(self) -> float:
        """How long one attempt may take before its client gives up."""
        return self.deadline_seconds if self.patience_seconds is None else self.patience_seconds

    @property
    def end_seconds(self) -> float:
        """When its last request is sent."""
        return self.begin_seconds + self.duration_seconds


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Flows on top of each other."""

    name: str
    flows: tuple[Flow, ...]

    @property
    def duration_seconds(self) -> float:
        """From the beginning to the last planned request."""
        return max((flow.end_seconds for flow in self.flows), default=0.0)

    @property
    def tenants(self) -> list[str]:
        """Every tenant of the load, once, in order of appearance."""
        return list(dict.fromkeys(tenant for flow in self.flows for tenant in flow.tenants))


def scaled(load: Load, *, rate: float = 1.0, time: float = 1.0) -> Load:
    """The load with its rates multiplied by one factor, and its durations by another; users and traces stay."""
    return msgspec.structs.replace(load, flows=tuple(_scaled_flow(flow, rate, time) for flow in load.flows))


def _scaled_flow(flow: Flow, rate: float, time: float) -> Flow:
    arrivals = flow.arrivals
    if isinstance(arrivals, Poisson | Constant | Bursts):
        arrivals = msgspec.structs.replace(arrivals, rate=arrivals.rate * rate)
    elif isinstance(arrivals, Square):
        arrivals = msgspec.structs.replace(arrivals, rate=arrivals.rate * rate, low_rate=arrivals.low_rate * rate)
    return msgspec.structs.replace(
        flow,
        arrivals=arrivals,
        begin_seconds=flow.begin_seconds * time,
        duration_seconds=flow.duration_seconds * time,
    )
