"""`tidegate doctor`: everything that a mesh needs, checked in groups, in the manner of `linkerd check`.

Works with nothing running, and with nothing installed but the environment that it runs in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.text import Text

from tidegate.cli import checks, config, machine, observe, ports, state, talk
from tidegate.cli.checks import Check, failed, passed
from tidegate.cli.config import Settings

GROUPS: Final = ("machine", "environments", "ports", "model", "mesh")


def run(settings: Settings, output: str) -> int:
    """Prints all checks; 1 when one fails."""
    mesh = state.Home(config.home()).read()
    running = mesh if mesh is not None and mesh.is_running else None
    found = [*check_here(settings, running), *check_mesh(running)]
    if output == "json":
        talk.out().print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        show(found)
    return talk.EXIT_FAILED if checks.failures(found) else 0


def check_here(settings: Settings, running: state.Mesh | None) -> list[Check]:
    """The machine, the environments, the ports and the model. A mesh that runs has its memory and ports already."""
    facts = machine.look(Path(settings.triton_python))
    found = checks.check_machine(
        facts,
        model_bytes=config.model_bytes(settings),
        arena_bytes=settings.arena_bytes,
    )
    if running is not None:
        found = [check for check in found if check.name not in {"memory", "shared memory"}]
    found += [_guarded("environments", name, check) for name, check in _environment_checks(settings)]
    if running is None:
        found.append(_guarded("ports", "free", lambda: check_ports(settings)))
    return [*found, _guarded("model", "files", lambda: check_model(settings))]


def check_ports(settings: Settings) -> Check:
    """Whether the default ports are free."""
    numbers = ports.assign(
        settings.replicas,
        config.lite_replica_count(settings),
        settings.schedulers,
        given={"ingress": settings.port},
        auto=False,
    )
    try:
        ports.check_free(settings.host, numbers)
    except ports.PortError as error:
        reason, _, fix = str(error).splitlines()[0].partition(": ")
        return failed("ports", "free", reason, fix or "choose others with --ports auto")
    return passed("ports", "free", f"all {len(numbers)}, the ingress on {settings.port}")


def check_model(settings: Settings) -> Check:
    """Whether the model can be read; its weights are not."""
    from tidegate.text.model_files import load_text_model

    path = settings.model_path or config.default_model_path()
    if not path:
        return failed("model", "files", "the model that comes with Tidegate is not installed", "run `make setup`")
    try:
        model = load_text_model(path, settings.model_name)
    except Exception as error:
        return failed(
            "model", "files", f"{path}: {_one_line(error)}", "give a GGUF file or a Hugging Face folder: --model"
        )
    return passed("model", "files", f"{model.name}: context of {model.context_token_count} tokens, {path}")


def check_mesh(mesh: state.Mesh | None) -> list[Check]:
    """The mesh that runs here; none is no fault."""
    if mesh is None:
        return [passed("mesh", "running", "no mesh runs here; `tidegate up` starts one")]
    view = asyncio.run(observe.look(mesh))
    found = [
        passed("mesh", each.name, f"{each.health} at {each.address}")
        if each.health == "ok"
        else failed("mesh", each.name, _red(each.health, each.last_error), f"see {each.log}")
        for each in view.processes
    ]
    for replica in view.replicas:
        name = f"replica {replica.address}"
        if replica.connected and replica.ready:
            found.append(passed("mesh", name, f"the scheduler holds {replica.credit_count} of its credits"))
        else:
            found.append(failed("mesh", name, replica.last_error or "not connected", "see the logs of its processes"))
    return found


def show(found: Sequence[Check]) -> None:
    """The checks for a person, in groups, with a last line that says what counts."""
    console = talk.out()
    for group in GROUPS:
        members = [check for check in found if check.group == group]
        if not members:
            continue
        console.print(Text(group, style="bold"))
        for check in members:
            mark, colour = talk.MARKS[check.outcome]
            console.print(Text.assemble((f"{mark} ", colour), f"{check.name}: {check.reason}"))
            if check.fix:
                console.print(Text(f"    {check.fix}", style="dim"))
        console.print()
    console.print(Text(checks.summary(found), style="red" if checks.failures(found) else "green"))


def _environment_checks(settings: Settings) -> list[tuple[str, Callable[[], Check]]]:
    return [
        ("envoy", _check_envoy),
        ("generated messages", _check_generated),
        ("triton", lambda: _check_triton(settings)),
    ]


def _check_envoy() -> Check:
    from tidegate.cli.envoy_config import envoy_path

    path = envoy_path()
    if Path(path).is_file():
        return passed("environments", "envoy", path)
    return failed("environments", "envoy", f"{path} does not exist", "run `make setup`")


def _check_generated() -> Check:
    from tidegate.v1 import batch_pb2, cache_pb2, inference_pb2, preprocess_pb2, replica_pb2, scheduler_pb2

    modules = (batch_pb2, cache_pb2, inference_pb2, preprocess_pb2, replica_pb2, scheduler_pb2)
    return passed("environments", "generated messages", f"{len(modules)} services")


def _check_triton(settings: Settings) -> Check:
    missing = machine.fits_together(Path(settings.triton_python))
    if missing:
        return failed("environments", "triton", missing, "run `make setup`")
    return passed("environments", "triton", settings.triton_python)


def _guarded(group: str, name: str, check: Callable[[], Check]) -> Check:
    """A check that breaks is a check that fails: doctor itself always ends."""
    try:
        return check()
    except Exception as error:
        return failed(group, name, _one_line(error), "run `make setup`")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _red(health: str, last_error: str) -> str:
    return f"{health} ({last_error})" if last_error else health
