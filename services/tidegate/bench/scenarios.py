"""The loads with a name. Rates are multiples of the capacity C of the server under test; durations are seconds.

C is the highest open-loop rate of `baseline` at which 99 % of the requests meet their deadline (calibrate.py). A
scenario is a declaration: steps, each a load that is run by itself, one after the other.
"""

from __future__ import annotations

from typing import Final

import msgspec

from tidegate.bench.arrivals import Arrivals, Poisson, Square
from tidegate.bench.flows import Flow, Load, scaled
from tidegate.bench.lengths import ConstantLength, Lengths, LogNormalLength

SHORTEST_SQUARE_SECONDS: Final = 0.1


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a single request is, where a scenario does not say otherwise."""

    prompt_tokens: Lengths = LogNormalLength(median=128, sigma=0.7, high=1024, low=16)
    answer_tokens: Lengths = LogNormalLength(median=48, sigma=0.6, high=256, low=8)
    deadline_seconds: float = 10.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A load with a name, or several in turn."""

    name: str
    summary: str
    steps: tuple[Load, ...]

    def at(self, capacity: float, *, time: float = 1.0) -> tuple[Load, ...]:
        """The steps for a server of this capacity (requests per second), their durations multiplied by `time`."""
        return tuple(scaled(step, rate=capacity, time=time) for step in self.steps)


def baseline(shape: Shape, rate: float, seconds: float) -> Load:
    """The load that C is measured with: one tenant, one class, Poisson."""
    return Load(name="baseline", flows=(_flow("baseline", Poisson(rate), shape, duration_seconds=seconds),))


def all_scenarios(shape: Shape) -> dict[str, Scenario]:
    """Every scenario by its name, made of requests of this shape."""
    made = (
        _flood(shape),
        _fairness(shape),
        _batch_storm(shape),
        _retry_storm(shape),
        _square(shape),
        _long_tail(shape),
        _soak(shape),
    )
    return {scenario.name: scenario for scenario in made}


def _flood(shape: Shape) -> Scenario:
    return Scenario(
        name="flood",
        summary="0.9 C, then 5 C, then 0.9 C again: what a flood does, and how soon it is forgotten",
        steps=(
            Load(
                name="flood",
                flows=(
                    _flow("before", Poisson(0.9), shape, duration_seconds=20),
                    _flow("flood", Poisson(5.0), shape, begin_seconds=20, duration_seconds=60),
                    _flow("after", Poisson(0.9), shape, begin_seconds=80, duration_seconds=20),
                ),
            ),
        ),
    )


def _fairness(shape: Shape) -> Scenario:
    quiet = {f"tenant-{number}": 1.0 for number in range(1, 10)}
    longer = ConstantLength(256)
    return Scenario(
        name="fairness",
        summary="ten tenants together at 2.5 C; one of them asks ten times as much, for longer answers",
        steps=(
            Load(
                name="fairness",
                flows=(
                    _flow("quiet", Poisson(2.5 * 9 / 19), shape, tenants=quiet),
                    _flow("loud", Poisson(2.5 * 10 / 19), shape, tenants={"loud": 1.0}, answer_tokens=longer),
                ),
            ),
        ),
    )


def _batch_storm(shape: Shape) -> Scenario:
    alone = _flow("realtime", Poisson(0.3), shape, service_class="realtime", duration_seconds=30)
    beside = msgspec.structs.replace(alone, duration_seconds=60.0)
    storm = _flow("batch", Poisson(12.0), shape, service_class="batch", begin_seconds=5, duration_seconds=50)
    return Scenario(
        name="batch-storm",
        summary="realtime at 0.3 C alone, then beside 12 C of batch",
        steps=(
            Load(name="realtime alone", flows=(alone,)),
            Load(name="realtime in a batch storm", flows=(beside, storm)),
        ),
    )


def _retry_storm(shape: Shape) -> Scenario:
    return Scenario(
        name="retry-storm",
        summary="0.8 C of clients that retry three times at once, through 30 s at 4 C",
        steps=(
            Load(
                name="retry-storm",
                flows=(
                    _flow("steady", Poisson(0.8), shape, retries="naive", duration_seconds=80),
                    _flow("storm", Poisson(3.2), shape, retries="naive", begin_seconds=20, duration_seconds=30),
                ),
            ),
        ),
    )


def _square(shape: Shape) -> Scenario:
    wave = Square(rate=10.0, high_seconds=SHORTEST_SQUARE_SECONDS, low_seconds=SHORTEST_SQUARE_SECONDS)
    return Scenario(
        name="square",
        summary="10 C for 100 ms, nothing for 100 ms, and so on",
        steps=(Load(name="square", flows=(_flow("square", wave, shape),)),),
    )


def _long_tail(shape: Shape) -> Scenario:
    tail = LogNormalLength(median=400, sigma=0.3, high=1024)
    return Scenario(
        name="long-tail",
        summary="0.8 C of work, in which one answer in twenty is eight times as long as the rest",
        steps=(
            Load(
                name="long-tail",
                flows=(
                    _flow("usual", Poisson(0.6 * 0.95), shape),
                    _flow("long", Poisson(0.6 * 0.05), shape, answer_tokens=tail, tenants={"long": 1.0}),
                ),
            ),
        ),
    )


def _soak(shape: Shape) -> Scenario:
    classes = {"realtime": 0.2, "standard": 0.5, "batch": 0.5}
    tenants = {"one": 1.0, "two": 2.0, "four": 4.0}
    flows = tuple(
        _flow(name, Poisson(rate), shape, service_class=name, tenants=tenants, leave_share=0.33, duration_seconds=600)
        for name, rate in classes.items()
    )
    return Scenario(
        name="soak",
        summary="ten minutes at 1.2 C, three classes, weights 1:2:4, and a third of the clients leaves",
        steps=(Load(name="soak", flows=flows),),
    )


def _flow(name: str, arrivals: Arrivals, shape: Shape, **fields: object) -> Flow:
    flow = Flow(
        name=name,
        arrivals=arrivals,
        prompt_tokens=shape.prompt_tokens,
        answer_tokens=shape.answer_tokens,
        deadline_seconds=shape.deadline_seconds,
    )
    return msgspec.structs.replace(flow, **fields)
