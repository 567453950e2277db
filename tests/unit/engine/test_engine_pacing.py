"""What a step may have of prompts, from what steps took."""

import pytest

from llm_engine.pacing import LEAST_TOKENS, StepPacer


def paced(stretch: float, *steps: tuple[int, int, float]) -> StepPacer:
    pacer = StepPacer(stretch, wide_count=16)
    for step in steps:
        pacer.observe(*step)
    return pacer


def test_a_step_takes_so_many_times_as_long_as_its_decodes():
    # 50 ms of decodes, and 1 ms a row beside prompts: twice as long is 100 rows.
    pacer = paced(2.0, (32, 0, 0.050), (32, 68, 0.100))
    assert pacer.prompt_token_bound(32) == 68


def test_few_decodes_leave_prompts_what_a_wide_batch_would():
    pacer = paced(2.0, (32, 0, 0.050), (32, 68, 0.100))
    for _ in range(50):
        pacer.observe(1, 0, 0.010)
    assert pacer.prompt_token_bound(1) == 99


def test_prompts_alone_say_what_a_row_costs():
    assert paced(3.0, (0, 200, 0.2), (20, 0, 0.02)).prompt_token_bound(20) == 40


def test_steps_come_to_take_as_long_as_they_may_however_unlike_their_rows_are():
    # Each of 20 decodes, which have long contexts, costs as much as 30 tokens of a prompt.
    pacer = paced(1.5, (20, 0, 0.6), (0, 100, 0.1))
    for _ in range(30):
        tokens = pacer.prompt_token_bound(20)
        seconds = 0.6 + 0.001 * tokens
        pacer.observe(20, tokens, seconds)
    assert seconds == pytest.approx(0.9, rel=0.05)


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
    steps = [(32, 0, 0.050), (32, 68, 0.100)]
    assert paced(2.0, *steps).prompt_token_bound(0) is None
    assert paced(0.0, *steps).prompt_token_bound(32) is None


def test_a_prompt_always_goes_on():
    assert paced(1.5, (16, 0, 0.001), (16, 100, 1.001)).prompt_token_bound(16) == LEAST_TOKENS


def test_the_bound_follows_when_steps_change():
    pacer = paced(2.0, (32, 0, 0.050), (32, 68, 0.100))
    for _ in range(50):
        pacer.observe(20, 0, 0.080)
    assert pacer.prompt_token_bound(20) == 140
    for _ in range(50):
        pacer.observe(20, 30, 0.100)
    assert pacer.prompt_token_bound(20) == 60
