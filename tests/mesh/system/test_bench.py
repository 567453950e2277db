"""`tidegate bench` as a user types it: a small flood of a mesh of its own, with and without Tidegate."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(200)

SMALL = ("--capacity", "40", "--duration", "5", "--deadline", "3")
"""C is given and not measured, and the flood of 5 C lasts 3 s: it asks for about twice of what the replicas can do."""

STOP_SECONDS = 40.0

PICTURES = {
    "What became of the requests": 2,
    "Goodput": 2,
    "Time to first token": 2,
    "Time per output token": 2,
    "Distribution": 2,
    # Without Tidegate nothing is refused, and nobody can look inside.
    "Refusals by reason": 1,
    "Queue by lane": 1,
    "Engines": 1,
}
"""On how many sides each has something to show."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the flood was, with the figures and the page that it left."""
    place = tmp_path_factory.mktemp("bench")
    argv = [sys.executable, "-m", "tidegate.cli.main", "bench", "--scenario", "flood", *SMALL, "--json", "flood.json"]
    with (place / "out").open("wb") as out:
        process = subprocess.Popen(argv, cwd=place, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        assert process.wait(150) == 0, (place / "out").read_text()
        yield place
    finally:
        # Its mesh ends with it, and it ends gently.
        process.terminate()
        process.wait(STOP_SECONDS)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    figures = json.loads((folder / "flood.json").read_bytes())
    assert (figures["title"], figures["capacity"]) == ("tidegate bench: flood", 40.0)
    return {run["name"]: run for run in figures["runs"]}


def test_both_sides_were_asked_the_same_and_every_request_has_one_right_end(runs: dict[str, Any]) -> None:
    assert list(runs) == ["tidegate", "without Tidegate"]
    asked = [{name: flow["requests"] for name, flow in run["flows"].items()} for run in runs.values()]
    assert asked[0] == asked[1]
    assert set(asked[0]) == {"before", "flood", "after"}
    for run in runs.values():
        outcomes = run["all"]["outcomes"]
        assert sum(outcomes.values()) == run["all"]["requests"] == run["attempts"] > 400
        assert set(outcomes) <= {"in_time", "late", "refused", "deadline_exceeded"}, (outcomes, run["failures"])
        assert run["all"]["in_time"] > 0
        assert run["all"]["ttft"]["p99"] > 0


def test_tidegate_refuses_with_a_reason_what_would_be_late_and_the_other_side_refuses_nothing(
    runs: dict[str, Any],
) -> None:
    assert set(runs["tidegate"]["all"]["refused"]) == {"SERVER_IS_OVERLOADED"}
    assert runs["without Tidegate"]["all"]["refused"] == {}


def test_the_ledger_and_the_server_agree_on_every_count(runs: dict[str, Any]) -> None:
    counts = runs["tidegate"]["agreement"]
    assert {"requests that reached the scheduler", "answers completed by the replicas"} <= {
        row["name"] for row in counts
    }
    assert [row for row in counts if not row["client_low"] <= row["server"] <= row["client_high"]] == []


def test_the_page_has_its_pictures_of_both_sides(folder: Path) -> None:
    text = (folder / "bench-flood.html").read_text(encoding="utf-8")
    sections = {part.partition("</h2>")[0]: part for part in text.split("<section><h2>")[1:]}
    assert {title: sections[title].count("<svg") for title in PICTURES} == PICTURES
    for title, section in sections.items():
        for side in ("tidegate", "without Tidegate"):
            assert f"<figcaption>{side}</figcaption>" in section, (title, side)
