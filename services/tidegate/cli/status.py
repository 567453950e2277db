"""`tidegate status`: one screen of the mesh that runs here."""

from __future__ import annotations

import asyncio

import msgspec
from rich.table import Table
from rich.text import Text

from tidegate.cli import config, observe, state, talk
from tidegate.cli.observe import MeshView, ReplicaView


def run(output: str) -> int:
    """Prints the status; 1 when no mesh runs here or something is red."""
    home = state.Home(config.home())
    mesh = home.read()
    if mesh is None or mesh.phase == "stopped":
        if output == "json":
            talk.out().print('{"running": false}')
        talk.fail(f"no mesh runs here ({home.directory}): start one with `tidegate up`, or set TIDEGATE_HOME")
        return talk.EXIT_FAILED
    view = asyncio.run(observe.look(mesh))
    if output == "json":
        talk.out().print(msgspec.json.format(msgspec.json.encode(view), indent=2).decode())
    else:
        show(view)
    return talk.EXIT_FAILED if view.errors else 0


def show(view: MeshView) -> None:
    """The view for a person."""
    console = talk.out()
    console.print(Text(f"{view.model_name} at {view.ingress}: {view.phase}", style="bold"))
    console.print(_processes(view))
    if view.replicas:
        console.print(_replicas(view))
    if view.lanes:
        console.print(_lanes(view))
    if view.brownout_step:
        console.print(Text(f"brownout: step {view.brownout_step}", style="yellow"))
    if view.totals:
        counts = [f"{name.replace('_', ' ')} {count}" for name, count in view.totals.items()]
        counts += [f"refused {reason} {count}" for reason, count in sorted(view.refused.items())]
        console.print(Text("requests: " + ", ".join(counts)))
    for error in view.errors:
        console.print(Text(f"{talk.MARKS['failed'][0]} {error}", style="red"))


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != "LAST ERROR", overflow="fold")
    return table


def _processes(view: MeshView) -> Table:
    table = _table("PROCESS", "HEALTH", "ADDRESS", "PID", "RESTARTS", "LAST ERROR")
    for each in view.processes:
        colour = "green" if each.health == "ok" else "yellow" if each.health == "starting" else "red"
        health = Text(each.health, style=colour)
        table.add_row(each.name, health, each.address, str(each.pid), str(each.restart_count), each.last_error)
    return table


def _replicas(view: MeshView) -> Table:
    table = _table("REPLICA", "MODEL", "STATE", "RUN", "WAIT", "CREDITS", "SENT", "KV", "TOK/S", "SCORE", "BREAKER")
    for each in view.replicas:
        red = not (each.connected and each.ready)
        word = "ready" if not red else "not ready" if each.connected else "away"
        used = 1 - each.free_kv_block_count / each.kv_block_count if each.kv_block_count else 0.0
        table.add_row(
            each.address,
            each.model,
            Text(word, style="red" if red else "green"),
            f"{each.running_request_count}/{each.slot_count}",
            str(each.waiting_request_count),
            f"{each.credit_count}+{each.preempting_credit_count}"
            if each.preempting_credit_count
            else str(each.credit_count),
            str(each.in_flight_count),
            f"{used:.0%}",
            f"{each.generated_tokens_per_second:.0f}",
            f"{each.score:.2f}",
            _breaker(each),
        )
    return table


def _breaker(replica: ReplicaView) -> Text:
    if replica.breaker != "closed":
        return Text(f"{replica.breaker} ({replica.breaker_reason})", style="red")
    share = replica.slow_start_share
    return Text(f"closed, slow start {share:.0%}" if 0 < share < 1 else "closed")


def _lanes(view: MeshView) -> Table:
    table = _table("LANE", "WAITING", "LIMIT", "TOKENS", "OLDEST", "DRAIN/S")
    for each in view.lanes:
        table.add_row(
            each.service_class,
            str(each.waiting_request_count),
            str(each.request_limit),
            str(each.waiting_token_count),
            f"{each.oldest_wait_seconds:.1f} s",
            f"{each.drain_rate:.1f}",
        )
    return table
