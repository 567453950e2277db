"""Every scenario keeps its bounds; `python tests/scenarios/run.py --help` says how to see and tune its figures."""

from __future__ import annotations

import pytest
from simulation.scenarios import SCENARIOS

LENGTHS = {"flood": 0.5, "mixed-flood": 0.5, "said-flood": 0.5, "floor": 0.5, "placement": 0.5, "drift": 0.5}
"""Times the scenario's usual length, where a test takes less of it."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_keeps_its_bounds(name):
    figures = SCENARIOS[name](LENGTHS.get(name, 1.0), 1)
    for figure in figures:
        print(f"{name}: {figure.name} {figure.value:.4g} {figure.bound}")
    assert [figure.name for figure in figures if not figure.holds] == []
