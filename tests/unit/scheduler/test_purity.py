"""What decides must be usable by the simulator: no network, no clock, no randomness, no environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tidegate.model
import tidegate.scheduler


def modules(package) -> set[str]:
    folder = Path(package.__file__).parent
    return {f"{package.__name__}.{path.stem}" for path in folder.glob("*.py")}


OTHERS = {
    f"tidegate.scheduler.{name}"
    for name in (
        "__main__", "anomalies", "cache_client", "endpoints", "envoy_messages", "gauges", "outcomes", "pipeline",
        "neighbours", "preprocess_client", "queue", "queue_messages", "queue_status", "replicas", "service", "servicer",
        "watch",
    )
}  # fmt: skip
"""The scheduler's modules that carry decisions out, or tell of them; all the rest decide."""

CREDITS = {f"tidegate.model.{name}" for name in ("capacity", "credits", "look_ahead", "moving_averages", "tokens")}
"""What decides about credits and slots in the model service, whose other modules are streams and their upkeep."""

DECIDING = (modules(tidegate.scheduler) - OTHERS) | CREDITS
IMPURE = {"grpc", "torch", "time", "random", "os", "asyncio", "datetime", "uvloop", "structlog", "envoy", "uuid",
          "secrets", "socket", "threading", "prometheus_client"}  # fmt: skip


def imported_by(module: str) -> set[str]:
    path = Path(tidegate.scheduler.__file__).parents[2] / f"{module.replace('.', '/')}.py"
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return imported


@pytest.mark.parametrize("module", sorted(DECIDING))
def test_a_module_that_decides_imports_nothing_impure(module):
    imported = imported_by(module)
    assert not {name.partition(".")[0] for name in imported} & IMPURE
    assert imported & (modules(tidegate.scheduler) | modules(tidegate.model)) <= DECIDING


def test_every_other_module_is_there():
    assert modules(tidegate.scheduler) >= OTHERS


def test_only_the_servicer_and_its_messages_know_envoys_protocol():
    folder = Path(tidegate.scheduler.__file__).parent
    knowing = {path.stem for path in folder.glob("*.py") if "envoy.service" in path.read_text(encoding="utf-8")}
    assert knowing == {"servicer", "envoy_messages", "service"}
