"""What Envoy is told to refuse, and when that may come back."""

from __future__ import annotations

import json

import pytest

from tidegate.common.shed_file import (
    NOTHING_REFUSED,
    RETRY_SPREAD,
    RETRY_STEPS_SECONDS,
    retry_key,
    retry_lots,
    retry_step,
    write_shares,
)


@pytest.mark.parametrize("shortest", RETRY_STEPS_SECONDS)
def test_each_step_within_the_spread_is_drawn_by_as_many(shortest):
    left, drawn = 1.0, {}
    for step, chance in retry_lots(shortest).items():
        drawn[step] = left * chance
        left -= drawn[step]
    assert left == pytest.approx(0)
    within = [step for step in RETRY_STEPS_SECONDS if shortest <= step <= RETRY_SPREAD * shortest]
    assert {step: share for step, share in drawn.items() if share > 0} == pytest.approx(
        dict.fromkeys(within, 1 / len(within))
    )


STEPS = [(0, 1), (1, 1), (1.01, 2), (5, 6), (64, 64), (1e9, 64), (float("inf"), 64)]


@pytest.mark.parametrize(("seconds", "step"), STEPS)
def test_the_step_is_not_before_there_is_a_chance_if_any_is_as_long(seconds, step):
    assert retry_step(seconds) == step


def test_the_file_has_the_lots_by_the_keys_that_envoy_asks_for(tmp_path):
    file = tmp_path / "shed.yaml"
    write_shares(file, NOTHING_REFUSED | {"batch": 0.25}, 24)
    layer = json.loads(file.read_text())["resources"][0]["layer"]
    assert layer["tidegate"]["shed"]["batch"] == {"numerator": 7_500, "denominator": "TEN_THOUSAND"}
    first, second, name = retry_key(24).split(".")
    assert layer[first][second][name] == round(10_000 / 4)
    assert layer[first][second]["16"] == 0
