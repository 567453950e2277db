"""`tidegate bench`: puts a load on a mesh (its own, or one that runs), and shows what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import yaml
from rich.table import Table
from rich.text import Text

from tidegate.bench import ledger as ledgers
from tidegate.bench.arrivals import PlanError
from tidegate.bench.calibrate import NoCapacity, calibrate
from tidegate.bench.flows import Load
from tidegate.bench.ledger import Ledger
from tidegate.bench.own_mesh import MeshDidNotStart, OwnMesh, mesh_target
from tidegate.bench.plain_envoy import UNBOUNDED, PlainEnvoy
from tidegate.bench.plan import Plan
from tidegate.bench.progress import ProgressLine
from tidegate.bench.report.page import page
from tidegate.bench.running import run
from tidegate.bench.scenarios import Shape
from tidegate.bench.summary import Summary, summary
from tidegate.bench.tables import SPLIT_HEAD, split_rows, summary_rows
from tidegate.bench.targets import Protocol, Target
from tidegate.bench.workers import WorkerFailed, Workers
from tidegate.cli import config, state, talk

EXIT_THRESHOLD: Final = 99
"""As k6 has it: the run went well, and a figure is below what was asked."""

PLAIN: Final = "plain"
"""In the place of an address: an Envoy that balances by turns over the replicas of a mesh of the command's own."""

PAUSE_SECONDS: Final = 3.0
"""Between two runs, so that what one leaves behind does not fall to the next."""


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    title: str
    text: str
    steps: tuple[Load, ...]
    """In multiples of C where `capacity` is not 1 by definition (custom loads)."""
    shape: Shape
    is_relative: bool
    """Whether the steps' rates are multiples of C."""
    capacity: float | None
    """None: measure it."""
    address: str
    """Empty: a mesh of its own."""
    compare: Mapping[str, str]
    """More targets by name."""
    protocol: Protocol
    model: str
    engine: str
    replicas: int
    api_keys_file: str
    workers: int
    seed: int
    time_factor: float
    fail_under_goodput: float | None
    json_path: str
    report_path: str
    ledger_path: str
    output: str
    api_keys: Mapping[str, str] = field(default_factory=dict)


def run_command(options: Options) -> int:
    """Runs it; the exit status."""
    try:
        return asyncio.run(_run(options))
    except asyncio.CancelledError:
        return talk.EXIT_INTERRUPTED
    except (PlanError, WorkerFailed, NoCapacity, MeshDidNotStart, OSError) as error:
        talk.fail(str(error))
        return talk.EXIT_USAGE if isinstance(error, PlanError) else talk.EXIT_FAILED


async def _run(options: Options) -> int:
    stop = _Stop()
    async with _targets(options) as targets, Workers(options.workers) as workers:
        capacity = await _capacity(options, targets[0], workers)
        done = await _all_runs(options, targets, workers, capacity, stop)
    summaries = [summary(each) for each in done]
    _write_files(options, done, summaries, capacity)
    _show(options, summaries, capacity)
    if stop.event.is_set():
        return talk.EXIT_INTERRUPTED
    least = options.fail_under_goodput
    if least is not None and any(each.all.goodput_share < least for each in summaries if each.name in _own(targets)):
        talk.fail(f"less than {least:.1%} of the requests were in time")
        return EXIT_THRESHOLD
    return 0


class _Stop:
    """Ctrl-C (or SIGTERM): during a run it ends early and is shown; at any other moment everything ends."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self._is_gentle = False
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._take)

    @contextlib.contextmanager
    def is_gentle(self) -> Iterator[None]:
        """While a run is under way."""
        self._is_gentle = True
        try:
            yield
        finally:
            self._is_gentle = False

    def _take(self) -> None:
        assert self._task is not None
        if self._is_gentle and not self.event.is_set():
            self.event.set()
        else:
            self._task.cancel()


async def _all_runs(
    options: Options, targets: list[Target], workers: Workers, capacity: float | None, stop: _Stop
) -> list[Ledger]:
    factor = capacity if options.is_relative and capacity is not None else 1.0
    done: list[Ledger] = []
    for load in scaled_steps(options, factor):
        for target in targets:
            if stop.event.is_set() and done:
                return done
            if done:
                await asyncio.sleep(PAUSE_SECONDS)
            name = target.name if len(options.steps) == 1 else f"{target.name}, {load.name}"
            line = ProgressLine(name, load.duration_seconds)
            plan = Plan(load=load, seed=options.seed)
            with stop.is_gentle():
                done.append(await run(plan, target, name=name, workers=workers, on_progress=line, stop=stop.event))
            line.end()
    return done


def scaled_steps(options: Options, factor: float) -> list[Load]:
    """The loads to run, at their real rates and durations."""
    from tidegate.bench.flows import scaled

    return [scaled(load, rate=factor, time=options.time_factor) for load in options.steps]


async def _capacity(options: Options, target: Target, workers: Workers) -> float | None:
    if options.capacity is not None or not options.is_relative:
        return options.capacity
    talk.err().print(Text("measuring the capacity C; --capacity R takes it as given"))
    capacity = await calibrate(
        target, options.shape, workers, seed=options.seed, say=lambda line: talk.err().print(Text(f"  {line}"))
    )
    talk.err().print(Text(f"C = {capacity:.1f} requests/s"))
    return capacity


@contextlib.asynccontextmanager
async def _targets(options: Options) -> AsyncIterator[list[Target]]:
    """The targets: the mesh of its own or the one that was named, and those to compare it with."""
    others = {name: address for name, address in options.compare.items() if address != PLAIN}
    plain_names = [name for name, address in options.compare.items() if address == PLAIN]
    if options.address:
        yield [_named_target(options), *_compared(options, others, {})]
        return
    tenants = list(dict.fromkeys(tenant for load in options.steps for tenant in load.tenants))
    # The loads of this command are its own doing; the tenants' usual rates are another subject.
    settings = {
        "TIDEGATE_UP_TENANT_REQUESTS_PER_SECOND": "1000000",
        "TIDEGATE_UP_TENANT_BURST_REQUESTS": "1000000",
        **(UNBOUNDED if plain_names else {}),
    }
    keyed = [tenant for tenant in [*tenants, "default"] if tenant]
    mesh = OwnMesh(
        replicas=options.replicas, engine=options.engine, tenants=list(dict.fromkeys(keyed)), settings=settings
    )
    talk.err().print(Text(f"starting a mesh of {options.replicas} replicas, engine {options.engine or 'default'}"))
    async with mesh, contextlib.AsyncExitStack() as stack:
        if plain_names:
            addresses = [mesh.address(f"model-{index}") for index in range(options.replicas)]
            plain = await stack.enter_async_context(PlainEnvoy(addresses, mesh.home))
            others |= dict.fromkeys(plain_names, plain.round_robin)
        yield [mesh.target(protocol=options.protocol), *_compared(options, others, mesh.api_keys, mesh.state)]


def _named_target(options: Options) -> Target:
    keys = _keys_by_tenant(options.api_keys_file)
    mesh = state.Home(config.home()).read()
    if mesh is not None and mesh.is_running and mesh.addresses.get("ingress") == options.address:
        return mesh_target(mesh, name="tidegate", protocol=options.protocol, api_keys=keys, engine=options.engine)
    return Target(name="target", address=options.address, protocol=options.protocol, model=options.model, api_keys=keys)


def _compared(
    options: Options, addresses: Mapping[str, str], keys: Mapping[str, str], mesh: state.Mesh | None = None
) -> list[Target]:
    return [
        Target(
            name=name,
            address=_host_and_port(name, address, mesh),
            protocol=options.protocol,
            model=mesh.model_name if mesh is not None else options.model,
            api_keys=keys or _keys_by_tenant(options.api_keys_file),
            engine=options.engine if mesh is not None else "",
            model_path=mesh.model_path if mesh is not None else "",
        )
        for name, address in addresses.items()
    ]


def _host_and_port(name: str, address: str, mesh: state.Mesh | None) -> str:
    """The address, in whose place a port of the mesh's own may be named."""
    named = mesh.addresses if mesh is not None else {}
    address = named.get(address, address)
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        known = f", {PLAIN}, or one of {', '.join(sorted(named))}" if named else ""
        raise PlanError(f"--compare {name}={address}: the address is host:port{known}")
    return address


def _keys_by_tenant(path: str) -> dict[str, str]:
    if not path:
        key = os.environ.get("OPENAI_API_KEY")
        return {"default": key} if key else {}
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise PlanError(f"{path} is not a mapping of API keys to tenants")
    return {str(tenant): str(key) for key, tenant in content.items()}


def _own(targets: list[Target]) -> set[str]:
    """Thresholds are for the first target; what it is compared with may do as it likes."""
    return {targets[0].name}


def _write_files(options: Options, done: list[Ledger], summaries: list[Summary], capacity: float | None) -> None:
    if options.json_path:
        Path(options.json_path).write_bytes(_json(options, summaries, capacity))
    if options.report_path:
        text = page(options.title, done, capacity=capacity, text=options.text)
        Path(options.report_path).write_text(text, encoding="utf-8")
        talk.err().print(Text(f"the page with the pictures: {options.report_path}"))
    if options.ledger_path:
        for number, each in enumerate(done):
            path = Path(options.ledger_path)
            ledgers.write(each, path if len(done) == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}"))


def _json(options: Options, summaries: list[Summary], capacity: float | None) -> bytes:
    content = {"title": options.title, "capacity": capacity, "runs": summaries}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _show(options: Options, summaries: list[Summary], capacity: float | None) -> None:
    if options.output == "json":
        sys.stdout.write(_json(options, summaries, capacity).decode())
        return
    console = talk.out()
    console.print(_table(("", *(each.name for each in summaries)), summary_rows(summaries)))
    for each in summaries:
        rows = split_rows(each)
        if rows:
            console.print(Text(f"\n{each.name}", style="bold"))
            console.print(_table(SPLIT_HEAD, rows))
        for what, count in each.failures.items():
            console.print(Text(f"{each.name}: failed {count} times: {what}", style="red"))
        if each.agreement and all(row.agrees for row in each.agreement):
            console.print(Text(f"{each.name}: the ledger and the server agree on all {len(each.agreement)} counts"))
        for warning in each.warnings:
            talk.err().print(Text(f"{talk.MARKS['warning'][0]} {each.name}: {warning}", style="yellow"))


def _table(head: tuple[str, ...], rows: list[tuple[str, list[str]]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for name, texts in rows:
        table.add_row(name, *texts)
    return table
