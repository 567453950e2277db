"""What a step may have of prompts, from what steps took."""

import pytest

from llm_engine.pacing import LEAST_TOKENS, StepPacer


def paced(stretch: float, *steps: tuple[int, int, float]) -> StepPacer:
    pacer = StepPacer(stretch, wide_count=16)
    for step in steps:
        pacer.observe(*step)
    return pacer


def test_a_step_takes_so_many_times_as_long_as_its_decodes():
    # 50 ms of decodes and 1 ms a token of a prompt: twice as long is 50 tokens.
    pacer = paced(2.0, (32, 0, 0.050), (32, 100, 0.150))
    assert pacer.prompt_token_bound(32) == 50


def test_few_decodes_leave_prompts_what_a_wide_batch_would():
    pacer = paced(2.0, (32, 0, 0.050), (32, 100, 0.150))
    for _ in range(50):
        pacer.observe(1, 0, 0.010)
    # 100 ms, less the 10 of the decode.
    assert pacer.prompt_token_bound(1) == 90


def test_prompts_alone_say_what_a_token_costs():
    assert paced(3.0, (0, 200, 0.2), (20, 0, 0.02)).prompt_token_bound(20) == 40


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [(20, 0, 0.02)],
        [(0, 200, 0.2)],
        [(20, 100, 0.2)],
        [(15, 0, 0.02), (15, 100, 0.2)],
    ],
    ids=["nothing", "no prompt", "no decode", "never apart", "no wide batch"],
)
def test_what_is_not_known_is_no_bound(steps):
    assert paced(2.0, *steps).prompt_token_bound(20) is None


def test_without_decodes_or_without_a_stretch_there_is_no_bound():
    steps = [(32, 0, 0.050), (32, 100, 0.150)]
    assert paced(2.0, *steps).prompt_token_bound(0) is None
    assert paced(0.0, *steps).prompt_token_bound(32) is None


def test_a_prompt_always_goes_on():
    assert paced(1.5, (16, 0, 0.001), (16, 100, 1.001)).prompt_token_bound(16) == LEAST_TOKENS
    # A step that took no longer for its prompt's tokens says that they cost nothing.
    assert paced(2.0, (16, 0, 0.010), (16, 8, 0.005)).prompt_token_bound(16) is None


def test_the_bound_follows_when_steps_change():
    pacer = paced(2.0, (32, 0, 0.050), (32, 100, 0.150))
    for _ in range(50):
        pacer.observe(20, 0, 0.080)
    assert pacer.prompt_token_bound(20) == 80
    for _ in range(50):
        pacer.observe(20, 10, 0.100)
    assert pacer.prompt_token_bound(20) == 40
