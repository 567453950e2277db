"""What decides must be usable by the simulator: no network, no clock, no randomness, no environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tidegate.scheduler

FOLDER = Path(tidegate.scheduler.__file__).parent
PURE = ["admission", "anomaly_features", "bodies", "circuit", "credits", "dispatch", "forecast", "lanes", "placement",
        "replica_table", "request"]  # fmt: skip
IMPURE = {"grpc", "torch", "time", "random", "os", "asyncio", "datetime", "uvloop", "structlog", "envoy"}


@pytest.mark.parametrize("name", PURE)
def test_a_module_that_decides_imports_nothing_impure(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert not imported & IMPURE


def test_only_the_servicer_and_its_messages_know_envoys_protocol():
    knowing = {path.stem for path in FOLDER.glob("*.py") if "envoy.service" in path.read_text(encoding="utf-8")}
    assert knowing == {"servicer", "envoy_messages", "service"}
