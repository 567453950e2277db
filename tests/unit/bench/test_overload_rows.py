"""What the overload benchmark reads from columns and metrics, and how it compares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def rows():
    return module("overload_rows")


def module(name: str):
    """A module of the benchmark's own folder, which is no package."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
        return found
    finally:
        sys.path.remove(str(BENCH))


def test_attempts_at_an_engine_are_all_it_began_and_all_that_went_on(rows):
    page = (
        "# HELP tidegate_requests_total Requests that ended, by outcome and reason.\n"
        "# TYPE tidegate_requests_total counter\n"
        'tidegate_requests_total{outcome="completed",reason=""} 41.0\n'
        'tidegate_requests_total{outcome="cancelled",reason="CANCELLED"} 5.0\n'
        'tidegate_requests_total{outcome="refused",reason="SERVER_IS_OVERLOADED"} 7.0\n'
        "# HELP tidegate_resumes_total Streams that went on after their engine broke.\n"
        "# TYPE tidegate_resumes_total counter\n"
        "tidegate_resumes_total 2.0\n"
    )
    assert rows.engine_attempts(page) == 48
