"""What `tidegate bench` compares with."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tidegate.bench.arrivals import PlanError
from tidegate.cli import bench, main, talk


@pytest.fixture
def options_of(monkeypatch):
    """The options that a command line comes to, or its exit status and words."""

    def options_of(*words):
        taken = []
        monkeypatch.setattr(bench, "run_command", lambda options: taken.append(options) or 0)
        result = CliRunner().invoke(main.cli, ["bench", *words])
        return taken[0] if taken else (result.exit_code, result.output)

    return options_of


def test_a_flood_is_compared_with_the_same_replicas_without_tidegate(options_of):
    assert options_of("--scenario", "flood").compare == {"without Tidegate": bench.PLAIN}


def test_nothing_is_compared_where_that_is_said_or_the_mesh_is_not_its_own(options_of):
    assert options_of("--scenario", "flood", "--compare", "nothing").compare == {}
    assert options_of("--scenario", "flood", "--address", "127.0.0.1:8080").compare == {}
    assert options_of("--scenario", "square").compare == {}


def test_any_scenario_may_be_compared_with_plain_and_with_others(options_of):
    compare = options_of("--scenario", "square", "--compare", "plain", "--compare", "other=127.0.0.1:1").compare
    assert compare == {"without Tidegate": bench.PLAIN, "other": "127.0.0.1:1"}


def test_plain_is_about_a_mesh_of_its_own(options_of):
    status, words = options_of("--scenario", "flood", "--address", "127.0.0.1:8080", "--compare", "plain")
    assert status == talk.EXIT_USAGE
    assert "leave out --address" in words


def test_an_address_that_is_none_is_told_with_what_there_is(options_of):
    options = options_of("--scenario", "square", "--compare", "router=somewhere")
    with pytest.raises(PlanError, match="--compare router=somewhere: the address is host:port"):
        bench._host_and_port("router", options.compare["router"], None)
