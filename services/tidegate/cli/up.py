"""`tidegate up`: checks the machine, starts the whole mesh, proves that it answers, and stops it without a trace.

The ready line is true: it comes after a real question was answered through the ingress.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from tidegate.cli import checks, config, machine, ports, probes, process_table, state, talk
from tidegate.cli.config import Settings
from tidegate.cli.supervisor import Supervisor
from tidegate.common import errors

SAY_SOMETHING_SECONDS: Final = 2.0
"""While a start waits, nothing is silent for longer."""

SAY_PROBLEM_SECONDS: Final = 3.0
"""How often it is said that the first answer failed, and how."""

ASK_AGAIN_SECONDS: Final = 0.5
"""A failed first answer often fails at once; asked again without a pause it would load what is starting."""

TICK_SECONDS: Final = 0.1


class StartError(Exception):
    """The mesh cannot be started; the message has a line for each reason, with what to do."""


class _Told:
    """Tells what happens to the processes: before the mesh is ready as steps, afterwards as news."""

    def __init__(self, steps: talk.Steps, mesh: state.Mesh) -> None:
        self._steps = steps
        self._mesh = mesh

    def became_ready(self, name: str, seconds: float, restart_count: int) -> None:
        again = f" again (restart {restart_count})" if restart_count else ""
        self._steps.done(f"{name} is ready{again}", seconds)

    def exited(self, name: str, how: str, delay_seconds: float) -> None:
        self._steps.warn(f"{name} ended ({how}); starting it again in {delay_seconds:.1f} s")

    def gave_up(self, name: str, how: str, reason: str, tail: list[str]) -> None:
        log = next(record.log for record in self._mesh.processes if record.name == name)
        self._steps.failed(f"{name} ended ({how}) and is not started again: {reason}; its log is {log}")
        self._steps.detail(tail)

    def broke(self, what: str, error: BaseException) -> None:
        self._steps.failed(f"{what} failed, so the mesh stops: {type(error).__name__}: {error}")


def run(settings: Settings, *, given_ports: dict[str, int], auto_ports: bool) -> int:
    """Runs a mesh until it is interrupted; answers the exit code.

    0: it was ready and then stopped. 1: it could not be started. 130: interrupted before it was ready.
    """
    # For Envoy's own replies, which are written here, and for the services, which inherit it.
    os.environ[errors.OVERLOAD_STATUS_VARIABLE] = str(settings.overload_status)
    errors.set_overload_status(str(settings.overload_status))
    steps = talk.Steps()
    home = state.Home(config.home())
    try:
        home.claim()
        leftovers = home.clean_up()
        if leftovers:
            steps.warn(f"an earlier mesh had left {leftovers.process_count} processes and {leftovers.region_count} "
                       "shared-memory regions; they are removed")  # fmt: skip
        mesh = plan(settings, given_ports=given_ports, auto_ports=auto_ports)
        check(settings, mesh)
        steps.done(f"machine and ports checked; state in {home.directory}", steps.elapsed_seconds)
    except (state.AlreadyRunning, ports.PortError, StartError, OSError) as error:
        talk.fail(str(error))
        home.release()
        return talk.EXIT_FAILED
    try:
        return asyncio.run(_live(home, mesh, settings, steps))
    except TimeoutError as error:  # A process hangs in the kernel; the next start tries again.
        talk.fail(str(error))
        return talk.EXIT_FAILED
    finally:
        state.remove_shared_memory(mesh.shared_memory_prefixes)
        home.release()


def plan(settings: Settings, *, given_ports: dict[str, int], auto_ports: bool) -> state.Mesh:
    """The mesh that the settings ask for, with an address for everything.

    Raises:
        PortError: ports that make no sense.
        StartError: there is no model.
    """
    given = dict(given_ports)
    if not auto_ports or settings.port != ports.FIXED["ingress"]:
        given.setdefault("ingress", settings.port)
    lite_replica_count = config.lite_replica_count(settings)
    numbers = ports.assign(settings.replicas, lite_replica_count, settings.schedulers, given=given, auto=auto_ports)
    model_path = settings.model_path or config.default_model_path()
    if not model_path:
        raise StartError("the model that comes with Tidegate is not installed: run `make setup`, or give --model PATH")
    from tidegate.cli.processes import shared_memory_prefixes

    run_id = state.new_run_id()
    return state.Mesh(
        run_id=run_id,
        supervisor=process_table.ProcessId.of(os.getpid()),
        model_name=settings.model_name,
        model_path=str(Path(model_path).resolve()),
        shared_memory_prefixes=shared_memory_prefixes(run_id),
        arena_region=f"tidegate-{run_id}-tokens",
        addresses={
            name: ports.address(settings.host if name == "ingress" else ports.LOOPBACK, number)
            for name, number in numbers.items()
        },
        replica_count=settings.replicas,
        lite_replica_count=lite_replica_count,
        scheduler_count=settings.schedulers,
        lite_model_name=settings.lite_model_name if lite_replica_count else "",
        lite_model_path=str(Path(settings.lite_model_path).resolve()) if lite_replica_count else "",
        ingress_scheme="https" if settings.tls_certificate_file else "http",
    )


def check(settings: Settings, mesh: state.Mesh) -> None:
    """Raises StartError or PortError when the machine cannot carry the mesh."""
    facts = machine.look(Path(settings.triton_python))
    found = checks.check_machine(
        facts,
        model_bytes=config.model_bytes(settings),
        arena_bytes=settings.arena_bytes,
    )
    lines = [f"{each.name}: {each.reason}; {each.fix}" for each in checks.failures(found)]
    if not Path(settings.triton_python).exists():
        lines.append(f"there is no Triton environment ({settings.triton_python}): run `make setup`")
    if lines:
        raise StartError("\n".join(lines))
    numbers = {name: int(address.rpartition(":")[2]) for name, address in mesh.addresses.items()}
    ports.check_free(settings.host, numbers)


async def _live(home: state.Home, mesh: state.Mesh, settings: Settings, steps: talk.Steps) -> int:
    """The mesh's whole life in this process."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _raise_open_file_limit()
    home.write(mesh)
    supervisor = Supervisor(home, mesh, _Told(steps, mesh))
    try:
        code = await _start(supervisor, home, mesh, settings, steps, stop)
        if code is not None:
            return code
        await _first_of(stop, supervisor.failed)
        return talk.EXIT_FAILED if supervisor.failed.is_set() and not stop.is_set() else 0
    finally:
        steps.pause()
        began_at = steps.elapsed_seconds
        mesh.phase = "stopping"
        home.write(mesh)
        await supervisor.stop()
        state.remove_shared_memory(mesh.shared_memory_prefixes)
        mesh.phase = "stopped"
        home.write(mesh)
        steps.done("everything is stopped", steps.elapsed_seconds - began_at)


async def _start(
    supervisor: Supervisor,
    home: state.Home,
    mesh: state.Mesh,
    settings: Settings,
    steps: talk.Steps,
    stop: asyncio.Event,
) -> int | None:
    """Brings the mesh to its first answer; answers an exit code when that did not work."""
    from tidegate.cli import processes  # Heavy: after the first lines were said.
    from tidegate.cli.envoy_config import EnvoyConfigError
    from tidegate.cli.triton_runtime import TritonRuntimeError

    try:
        processes.write_files(home, mesh, settings)
        supervisor.start(processes.programs(home, mesh, settings))
    except (EnvoyConfigError, TritonRuntimeError, OSError) as error:
        talk.fail(str(error))
        return talk.EXIT_FAILED
    steps.done(f"configuration written; {len(mesh.processes)} processes started", steps.elapsed_seconds)
    deadline = steps.elapsed_seconds + settings.start_timeout_seconds
    text, problem = await wait_for_answer(
        lambda: _ask_all_models(mesh, _first_key(settings)),
        not_ready=supervisor.not_ready,
        is_over=lambda: stop.is_set() or supervisor.failed.is_set() or steps.elapsed_seconds >= deadline,
        steps=steps,
    )
    steps.pause()
    if text:
        mesh.phase = "ready"
        home.write(mesh)
        _say_ready(mesh, steps)
        return None
    if stop.is_set():
        return talk.EXIT_INTERRUPTED
    if not supervisor.failed.is_set():
        cause = f"the ingress answers: {problem}" if problem else f"not ready: {', '.join(supervisor.not_ready())}"
        steps.failed(f"no answer within {settings.start_timeout_seconds:.0f} s; {cause}; logs are in {home.logs}")
    return talk.EXIT_FAILED


async def _ask_all_models(mesh: state.Mesh, key: str) -> tuple[str, str]:
    """The usual model's answer, once the lite one has answered, too, and all is well; or ("", what is wrong)."""
    if mesh.lite_model_name:
        text, problem = await probes.real_answer(_url(mesh), mesh.lite_model_name, key)
        if not text:
            return "", problem
    text, problem = await probes.real_answer(_url(mesh), mesh.model_name, key)
    # An answer may come from a replica of which Envoy does not know yet that it is healthy.
    problem = problem or await probes.health_problem(_url(mesh))
    # And one that a scheduler does not reach gets nothing until it does.
    replica_count = mesh.replica_count + mesh.lite_replica_count
    problem = problem or await probes.unreached_replicas(mesh.scheduler_addresses, replica_count)
    return ("", problem) if problem else (text, "")


async def wait_for_answer(
    ask: Callable[[], Awaitable[tuple[str, str]]],
    *,
    not_ready: Callable[[], list[str]],
    is_over: Callable[[], bool],
    steps: talk.Steps,
) -> tuple[str, str]:
    """Asks, once every process is ready, until the model answers; (text, "") or, when it is over, ("", last problem).

    Args:
        ask: answers (text, "") or ("", what is wrong).
        not_ready: the processes that are waited for.
    """
    problem = ""
    while not is_over():
        missing = not_ready()
        if missing:
            steps.waiting(f"waiting for {', '.join(missing)}", every_seconds=SAY_SOMETHING_SECONDS)
            await asyncio.sleep(TICK_SECONDS)
            continue
        asked_at = steps.elapsed_seconds
        asking = asyncio.ensure_future(ask())
        while not asking.done() and not is_over():
            _say_asking(steps, problem)
            await asyncio.wait([asking], timeout=TICK_SECONDS)
        if not asking.done():
            asking.cancel()
            break
        text, problem = asking.result()
        if text:
            steps.pause()
            steps.done(f"the model answered through the ingress: {_short(text)}", steps.elapsed_seconds - asked_at)
            return text, ""
        _say_asking(steps, problem)
        await asyncio.sleep(ASK_AGAIN_SECONDS)
    return "", problem


def _say_asking(steps: talk.Steps, problem: str) -> None:
    if problem:
        what = f"waiting for the first answer; the ingress says: {problem}"
        steps.waiting(what, every_seconds=SAY_PROBLEM_SECONDS)
    else:
        steps.waiting("waiting for the first answer", every_seconds=SAY_SOMETHING_SECONDS)


def _say_ready(mesh: state.Mesh, steps: talk.Steps) -> None:
    """The last line of a start, and commands to copy."""
    url, model = _url(mesh), mesh.model_name
    steps.done(f"ready after {steps.elapsed_seconds:.1f} s: {model} at {url}")
    commands = {name: _command(name) for name in ("tidegate", "python", "buf")}
    template = READY_TEXT if mesh.ingress_scheme == "http" else READY_TEXT_TLS
    text = template.format(url=url, model=model, address=ports.reachable(mesh.addresses["ingress"]), **commands)
    talk.out().print(text, end="")


READY_TEXT: Final = """
  {tidegate} chat

  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "What is a tide?"}}]}}'

  {python} -c 'from openai import OpenAI; print(OpenAI(base_url="{url}/v1", api_key="none").chat.completions.create(
    model="{model}", messages=[dict(role="user", content="What is a tide?")]).choices[0].message.content)'

  grpcurl -plaintext -d '{{"text": "A tide is", "max_tokens": 32}}' {address} tidegate.v1.Inference/Generate
  {buf} curl --http2-prior-knowledge --protocol grpc -d '{{"text": "A tide is", "max_tokens": 32}}' \\
    {url}/tidegate.v1.Inference/Generate

Ctrl-C stops everything.
"""

READY_TEXT_TLS: Final = """
  curl -k {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "What is a tide?"}}]}}'

  grpcurl -insecure -d '{{"text": "A tide is", "max_tokens": 32}}' {address} tidegate.v1.Inference/Generate

Ctrl-C stops everything.
"""
"""The certificate is not checked here: it is for the name that clients use, and these ask by address."""


def _command(name: str) -> str:
    """How to call a program of this environment from here: by name where the shell finds it, else by its path."""
    program = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found is not None and Path(found).absolute() == program:
        return name
    return os.path.relpath(program) if Path.cwd() in program.parents else str(program)


def _url(mesh: state.Mesh) -> str:
    return f"{mesh.ingress_scheme}://{ports.reachable(mesh.addresses['ingress'])}"


def _first_key(settings: Settings) -> str:
    """A key for the first question, where keys are asked for."""
    if not settings.api_keys_file:
        return ""
    from tidegate.cli.envoy_config import read_api_keys

    return next(iter(read_api_keys(Path(settings.api_keys_file))))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line[:57]}…”" if len(line) > 58 else f"“{line}”"


def _raise_open_file_limit() -> None:
    """Each client and each stream is a file; the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _first_of(*events: asyncio.Event) -> None:
    tasks: Sequence[asyncio.Task[bool]] = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
