"""What a step may have of prompts, from what steps took."""

import pytest

from llm_engine.pacing import LEAST_TOKENS, StepPacer


def paced(stretch: float, *steps: tuple[int, int, float]) -> StepPacer:
    pacer = StepPacer(stretch)
    for step in steps:
        pacer.observe(*step)
    return pacer


def test_a_step_takes_so_many_times_as_long_as_its_decodes():
    # 50 ms of decodes and 1 ms a token of a prompt: twice as long is 50 tokens.
    pacer = paced(2.0, (32, 0, 0.050), (32, 100, 0.150))
    assert pacer.prompt_token_bound(32) == 50


def test_prompts_alone_say_what_a_token_costs():
    assert paced(3.0, (0, 200, 0.2), (4, 0, 0.02)).prompt_token_bound(4) == 40


@pytest.mark.parametrize("steps", [[], [(4, 0, 0.02)], [(0, 200, 0.2)], [(4, 100, 0.2)]])
def test_what_is_not_known_is_no_bound(steps):
    assert paced(2.0, *steps).prompt_token_bound(4) is None


def test_without_decodes_or_without_a_stretch_there_is_no_bound():
    steps = [(32, 0, 0.050), (32, 100, 0.150)]
    assert paced(2.0, *steps).prompt_token_bound(0) is None
    assert paced(0.0, *steps).prompt_token_bound(32) is None


def test_a_prompt_always_goes_on():
    assert paced(1.5, (1, 0, 0.001), (1, 100, 1.001)).prompt_token_bound(1) == LEAST_TOKENS
    # A step that took no longer for its prompt's tokens says that they cost nothing.
    assert paced(2.0, (1, 0, 0.010), (1, 8, 0.005)).prompt_token_bound(1) is None


def test_the_bound_follows_when_steps_change():
    pacer = paced(2.0, (32, 0, 0.050), (32, 100, 0.150))
    for _ in range(50):
        pacer.observe(8, 0, 0.080)
    assert 79 <= pacer.prompt_token_bound(8) <= 81
    for _ in range(50):
        pacer.observe(8, 10, 0.100)
    assert 39 <= pacer.prompt_token_bound(8) <= 41
