"""From a load and a seed to the requests: when each is sent, by whom, how long, and whether its client leaves.

Invariants: the same load and seed give the same plan; requests are sorted by their planned time; each flow draws from
a generator of its own, so that a change to one flow leaves the others as they were. Columns, not objects: a flood
is a million requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tidegate.bench.arrivals import Closed, PlanError, Trace, times
from tidegate.bench.flows import Flow, Load
from tidegate.bench.lengths import draw
from tidegate.bench.traces import TraceRows, read_trace

CLOSED_REQUESTS: Final = 65_536
"""Requests that the users of a closed flow take in turn; after them the same lengths come again."""

NEVER: Final = np.inf


@dataclass(frozen=True)
class Requests:
    """Columns of requests; row i is request i."""

    flow: NDArray[np.int32]
    """Index into the load's flows."""
    tenant: NDArray[np.int32]
    """Index into the load's tenants."""
    planned_seconds: NDArray[np.float64]
    """From the beginning of the run; for a closed flow 0, because its users decide."""
    prompt_tokens: NDArray[np.int32]
    answer_tokens: NDArray[np.int32]
    leave_seconds: NDArray[np.float64]
    """After so long the client leaves; NEVER for most."""
    block_ids: tuple[tuple[int, ...], ...] = ()
    """Of a trace that knows them: the prompt's blocks. Empty, or one entry a request."""

    def __len__(self) -> int:
        return len(self.planned_seconds)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A load and its seed. The requests are made from them where they are needed: here, or in a worker."""

    load: Load
    seed: int = 1

    def open_requests(self) -> Requests:
        """The requests of all open flows, by planned time.

        Raises:
            PlanError: a flow that cannot be planned.
        """
        parts = [
            _open_flow(self.load, index, flow, self.seed)
            for index, flow in enumerate(self.load.flows)
            if not isinstance(flow.arrivals, Closed)
        ]
        return _merged(parts)

    def closed_requests(self, flow_index: int) -> Requests:
        """What the users of a closed flow take in turn."""
        flow = self.load.flows[flow_index]
        random = _generator(self.seed, flow_index)
        return _rows(self.load, flow_index, flow, np.zeros(CLOSED_REQUESTS), random)


def check(load: Load) -> None:
    """Raises PlanError where a load cannot be run."""
    if not load.flows:
        raise PlanError(f"the load {load.name} has no flows")
    for flow in load.flows:
        if not flow.tenants or min(flow.tenants.values()) < 0 or sum(flow.tenants.values()) <= 0:
            raise PlanError(f"the flow {flow.name} needs tenants with weights of 0 or more, not all 0")
        if isinstance(flow.arrivals, Closed) and (flow.arrivals.users < 1 or flow.arrivals.think_seconds < 0):
            raise PlanError(f"the flow {flow.name} needs at least one user and a time to think of 0 s or more")


def _open_flow(load: Load, index: int, flow: Flow, seed: int) -> Requests:
    random = _generator(seed, index)
    if isinstance(flow.arrivals, Trace):
        trace = read_trace(Path(flow.arrivals.path)).at_rate(flow.arrivals.rate)
        return _trace_rows(load, index, flow, trace, random)
    assert not isinstance(flow.arrivals, Closed)
    planned = flow.begin_seconds + times(flow.arrivals, flow.duration_seconds, random)
    return _rows(load, index, flow, planned, random)


def _rows(load: Load, index: int, flow: Flow, planned: NDArray[np.float64], random: np.random.Generator) -> Requests:
    count = len(planned)
    return Requests(
        flow=np.full(count, index, np.int32),
        tenant=_tenants(load, flow, count, random),
        planned_seconds=planned,
        prompt_tokens=draw(flow.prompt_tokens, count, random),
        answer_tokens=draw(flow.answer_tokens, count, random),
        leave_seconds=_leave_seconds(flow, count, random),
    )


def _trace_rows(load: Load, index: int, flow: Flow, trace: TraceRows, random: np.random.Generator) -> Requests:
    count = int(np.searchsorted(trace.seconds, flow.duration_seconds))
    return Requests(
        flow=np.full(count, index, np.int32),
        tenant=_tenants(load, flow, count, random),
        planned_seconds=flow.begin_seconds + trace.seconds[:count],
        prompt_tokens=trace.prompt_tokens[:count],
        answer_tokens=trace.answer_tokens[:count],
        leave_seconds=_leave_seconds(flow, count, random),
        block_ids=trace.block_ids[:count],
    )


def _tenants(load: Load, flow: Flow, count: int, random: np.random.Generator) -> NDArray[np.int32]:
    numbers = [load.tenants.index(tenant) for tenant in flow.tenants]
    weights = np.array(list(flow.tenants.values()), float)
    return random.choice(np.array(numbers, np.int32), count, p=weights / weights.sum())


def _leave_seconds(flow: Flow, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    leaves = random.uniform(0.0, 1.0, count) < flow.leave_share
    within = flow.deadline_seconds if flow.leave_within_seconds is None else flow.leave_within_seconds
    return np.where(leaves, random.uniform(0.0, within, count), NEVER)


def _merged(parts: list[Requests]) -> Requests:
    if not parts:
        nothing = np.empty(0, np.int32)
        return Requests(nothing, nothing, np.empty(0), nothing, nothing, np.empty(0))
    planned = np.concatenate([part.planned_seconds for part in parts])
    order = np.argsort(planned, kind="stable")
    blocks: tuple[tuple[int, ...], ...] = ()
    if any(part.block_ids for part in parts):
        all_blocks = [ids for part in parts for ids in part.block_ids or ((),) * len(part)]
        blocks = tuple(all_blocks[place] for place in order)
    return Requests(
        flow=np.concatenate([part.flow for part in parts])[order],
        tenant=np.concatenate([part.tenant for part in parts])[order],
        planned_seconds=planned[order],
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts])[order],
        answer_tokens=np.concatenate([part.answer_tokens for part in parts])[order],
        leave_seconds=np.concatenate([part.leave_seconds for part in parts])[order],
        block_ids=blocks,
    )


def _generator(seed: int, flow_index: int) -> np.random.Generator:
    return np.random.default_rng([seed, flow_index])
