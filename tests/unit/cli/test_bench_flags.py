"""What `tidegate bench` compares with, and what it sends for each scenario."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from click.testing import CliRunner

from tidegate.bench.arrivals import PlanError
from tidegate.bench.plan import NEVER, Plan
from tidegate.bench.scenarios import Shape, all_scenarios
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


C = 20.0
"""Requests a second."""


@dataclass(frozen=True)
class Sent:
    """A flow, its rate in multiples of C on average, and the shares of its tenants."""

    rate: float
    begin: float
    end: float
    service_class: str = "standard"
    retries: str = "none"
    tenants: Mapping[str, float] = field(default_factory=lambda: {"default": 1.0})


QUIET = {f"tenant-{number}": 1 / 9 for number in range(1, 10)}
WEIGHTS = {"one": 1 / 7, "two": 2 / 7, "four": 4 / 7}

SENT = {
    "flood": {
        "flood": {"before": Sent(0.9, 0, 20), "flood": Sent(5, 20, 80), "after": Sent(0.9, 80, 100)},
    },
    "fairness": {
        "fairness": {
            "quiet": Sent(2.5 * 9 / 19, 0, 60, tenants=QUIET),
            "loud": Sent(2.5 * 10 / 19, 0, 60, tenants={"loud": 1.0}),
        },
    },
    "batch-storm": {
        "realtime alone": {"realtime": Sent(0.3, 0, 30, "realtime")},
        "realtime in a batch storm": {"realtime": Sent(0.3, 0, 60, "realtime"), "batch": Sent(12, 5, 55, "batch")},
    },
    "retry-storm": {
        "retry-storm": {"steady": Sent(0.8, 0, 80, retries="naive"), "storm": Sent(3.2, 20, 50, retries="naive")},
    },
    "square": {
        "square": {"square": Sent(5, 0, 60)},
    },
    "long-tail": {
        "long-tail": {"usual": Sent(0.57, 0, 60), "long": Sent(0.03, 0, 60, tenants={"long": 1.0})},
    },
    "soak": {
        "soak": {
            name: Sent(rate, 0, 600, name, tenants=WEIGHTS)
            for name, rate in (("realtime", 0.2), ("standard", 0.5), ("batch", 0.5))
        },
    },
}


def planned(options_of, name):
    """The loads of a scenario and their requests, as the command would send them."""
    options = options_of("--scenario", name)
    assert options.is_relative
    loads = bench.scaled_steps(options, C)
    return [(load, Plan(load=load, seed=options.seed).open_requests()) for load in loads]


@pytest.mark.parametrize("name", all_scenarios(Shape()))
def test_a_scenario_sends_what_its_description_says(options_of, name):
    loads = planned(options_of, name)
    assert {load.name: [flow.name for flow in load.flows] for load, _ in loads} == {
        load: list(flows) for load, flows in SENT[name].items()
    }
    for load, requests in loads:
        for index, flow in enumerate(load.flows):
            sent, rows = SENT[name][load.name][flow.name], requests.flow == index
            times = requests.planned_seconds[rows]
            assert (flow.service_class, flow.retries) == (sent.service_class, sent.retries)
            assert times.min() >= sent.begin and times.max() < sent.end
            usual_count = sent.rate * C * (sent.end - sent.begin)
            assert len(times) == pytest.approx(usual_count, abs=4 * math.sqrt(usual_count))
            tenants = np.array(load.tenants)[requests.tenant[rows]]
            assert set(tenants) == set(sent.tenants)
            for tenant, share in sent.tenants.items():
                assert (tenants == tenant).mean() == pytest.approx(share, abs=2 / math.sqrt(len(times)))


def test_a_square_wave_is_silent_for_every_other_tenth_of_a_second(options_of):
    ((_, requests),) = planned(options_of, "square")
    assert (requests.planned_seconds % 0.2 < 0.1 + 1e-9).all()


def test_one_tenant_of_ten_asks_ten_times_as_much_for_longer_answers(options_of):
    ((load, requests),) = planned(options_of, "fairness")
    assert len(load.tenants) == 10
    loud = requests.flow == 1
    assert loud.sum() / (~loud).sum() == pytest.approx(10 / 9, rel=0.1)
    assert requests.answer_tokens[loud].min() == 256 >= requests.answer_tokens[~loud].max()


def test_one_answer_in_twenty_is_the_long_tail(options_of):
    ((_, requests),) = planned(options_of, "long-tail")
    long = requests.flow == 1
    assert long.mean() == pytest.approx(0.05, abs=0.02)
    usual, tail = requests.answer_tokens[~long], requests.answer_tokens[long]
    assert np.median(tail) / np.median(usual) == pytest.approx(8, rel=0.15)
    # The work of a request of the load that C is measured with is that of a usual one.
    assert requests.answer_tokens.sum() / (usual.mean() * C * 60) == pytest.approx(0.8, rel=0.15)


def test_a_third_of_the_clients_of_a_soak_leaves(options_of):
    ((_, requests),) = planned(options_of, "soak")
    assert (requests.leave_seconds < NEVER).mean() == pytest.approx(1 / 3, abs=0.02)


def test_the_help_names_every_scenario():
    words = CliRunner().invoke(main.cli, ["bench", "--help"]).output
    assert [name for name in all_scenarios(Shape()) if name not in words] == []
