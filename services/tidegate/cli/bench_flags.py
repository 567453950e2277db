"""From the flags of `tidegate bench` to what is to be run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tidegate.bench import lengths
from tidegate.bench.arrivals import Arrivals, Bursts, Closed, Constant, PlanError, Poisson, Square, Trace
from tidegate.bench.flows import Flow, Load, RetryPolicy, ServiceClassName
from tidegate.bench.plan import check
from tidegate.bench.scenarios import Shape, all_scenarios
from tidegate.bench.targets import Protocol
from tidegate.cli.bench import PLAIN, Options

CUSTOM: Final = "custom"
FLOOD: Final = "flood"
NOTHING: Final = "nothing"
WITHOUT: Final = "without Tidegate"
CUSTOM_SECONDS: Final = 30.0
BURST_SECONDS: Final = 1.0
"""Between two bursts of `--arrivals bursts`."""


def options(
    *,
    scenario: str,
    address: str,
    compare: Sequence[str],
    protocol: Protocol,
    replicas: int,
    engine: str,
    model: str,
    api_keys_file: str,
    capacity: float | None,
    rate: float | None,
    arrivals: str,
    users: int | None,
    think: float,
    trace: str | None,
    duration: float | None,
    tenants: str,
    service_class: ServiceClassName,
    prompt_tokens: str | None,
    answer_tokens: str | None,
    deadline: float,
    retries: RetryPolicy,
    leave: float,
    workers: int,
    seed: int,
    fail_under_goodput: float | None,
    json_path: str,
    report_path: str | None,
    ledger_path: str,
    output: str,
) -> Options:
    """What is to be run.

    Raises:
        PlanError: flags that make no sense together, with the flag.
    """
    shape = _shape(prompt_tokens, answer_tokens, deadline)
    known = all_scenarios(shape)
    time_factor = 1.0
    if scenario == CUSTOM:
        seconds = duration or CUSTOM_SECONDS
        flow = Flow(
            name=CUSTOM,
            arrivals=_arrivals(arrivals, rate, users, think, trace),
            duration_seconds=seconds,
            tenants=_tenants(tenants),
            service_class=service_class,
            prompt_tokens=shape.prompt_tokens,
            answer_tokens=shape.answer_tokens,
            deadline_seconds=deadline,
            retries=retries,
            leave_share=leave,
        )
        steps: tuple[Load, ...] = (Load(name=CUSTOM, flows=(flow,)),)
        text = "a load of flags"
    elif scenario in known:
        if rate is not None or users is not None or trace is not None:
            raise PlanError("--rate, --users and --trace are for custom loads; a scenario's rates are multiples of C")
        steps, text = known[scenario].steps, known[scenario].summary
        if duration is not None:
            time_factor = duration / max(step.duration_seconds for step in steps)
    else:
        raise PlanError(f"there is no scenario {scenario!r}; there are: {', '.join([*known, CUSTOM])}")
    for step in steps:
        check(step)
    return Options(
        title=f"tidegate bench: {scenario}",
        text=text,
        steps=steps,
        shape=shape,
        is_relative=scenario != CUSTOM,
        capacity=capacity,
        address=address,
        compare=_compared(scenario, compare, address),
        protocol=protocol,
        model=model,
        engine=engine,
        replicas=replicas,
        api_keys_file=api_keys_file,
        workers=workers,
        seed=seed,
        time_factor=time_factor,
        fail_under_goodput=fail_under_goodput,
        json_path=json_path,
        report_path=f"bench-{scenario}.html" if report_path is None else report_path,
        ledger_path=ledger_path,
        output=output,
    )


def _shape(prompt_tokens: str | None, answer_tokens: str | None, deadline: float) -> Shape:
    default = Shape()
    return Shape(
        prompt_tokens=lengths.parse(prompt_tokens) if prompt_tokens else default.prompt_tokens,
        answer_tokens=lengths.parse(answer_tokens) if answer_tokens else default.answer_tokens,
        deadline_seconds=deadline,
    )


def _arrivals(kind: str, rate: float | None, users: int | None, think: float, trace: str | None) -> Arrivals:
    if trace is not None:
        return Trace(trace, rate or 0.0)
    if users is not None or kind == "closed":
        if users is None or rate is not None:
            raise PlanError("a closed loop needs --users, and has no --rate")
        return Closed(users, think)
    if rate is None:
        raise PlanError("a custom load needs --rate, --users or --trace; or take a --scenario")
    made: dict[str, Arrivals] = {
        "poisson": Poisson(rate),
        "constant": Constant(rate),
        "bursts": Bursts(rate, BURST_SECONDS),
        "square": Square(rate),
    }
    return made[kind]


def _tenants(text: str) -> dict[str, float]:
    if not text:
        return {"default": 1.0}
    try:
        return {name: float(weight) for name, weight in _pairs(text.split(","), "--tenants").items()}
    except ValueError as error:
        raise PlanError(f"--tenants {text}: {error}") from error


def _compared(scenario: str, texts: Sequence[str], address: str) -> Mapping[str, str]:
    """The other targets by name; a flood of a mesh of its own is shown with and without what stands before it."""
    if not texts and scenario == FLOOD and not address:
        texts = [PLAIN]
    pairs = _pairs([f"{WITHOUT}={PLAIN}" if text == PLAIN else text for text in texts if text != NOTHING], "--compare")
    if address and PLAIN in pairs.values():
        raise PlanError(f"--compare {PLAIN} is about a mesh of its own; leave out --address")
    return pairs


def _pairs(texts: Sequence[str], flag: str) -> Mapping[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [name for name, sign, value in pairs if not (name and sign and value)]
    if wrong:
        raise PlanError(f"{flag} is NAME=VALUE, not {wrong[0]!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}
