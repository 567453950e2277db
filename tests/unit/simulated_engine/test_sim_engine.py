"""The simulated engine: its time, its tokens, and that all else is as in the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from answer import expected_token_ids

from llm_engine import ModelLoadError, RequestRefused

MODELS = Path(__file__).resolve().parents[3] / "triton_models"


def tokens(outputs) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_the_answer_is_the_expected_one_whatever_else_runs(make_engine, request_of, finish):
    engine = make_engine(kv_block_count=12)
    prompts = {str(n): [10 + n] * (1 + 5 * n) for n in range(6)}
    for name, prompt in prompts.items():
        engine.add(request_of(name, prompt, max_tokens=15, priority=int(name) % 2))
    outputs = finish(engine)
    assert engine.load.preemption_count > 0
    assert {name: tokens(each) for name, each in outputs.items()} == {
        name: expected_token_ids(prompt, 15, engine.answer_table) for name, prompt in prompts.items()
    }
    assert {each[-1].finish_reason for each in outputs.values()} == {"length"}


def test_a_resumed_request_goes_on_exactly_where_it_was(make_engine, request_of, finish):
    whole = expected_token_ids([5, 6, 7], 6, make_engine().answer_table)
    for cut in (1, 5):
        engine = make_engine()
        engine.add(request_of(tokens=[5, 6, 7, *whole[:cut]], prior_output_count=cut))
        outputs = finish(engine)["a"]
        assert tokens(outputs) == whole[cut:]
        assert (outputs[-1].prompt_token_count, outputs[-1].output_token_count) == (3, 6)


def test_a_natural_end_is_a_stop_and_ignore_eos_goes_past_it(make_engine, request_of, finish):
    engine = make_engine(answer_tokens_median=4, answer_tokens_sigma=0)
    engine.add(request_of("natural", max_tokens=10))
    engine.add(request_of("short", max_tokens=3))
    engine.add(request_of("ignoring", max_tokens=10, ignore_eos=True))
    outputs = finish(engine)
    ends = {name: (len(tokens(each)), each[-1].finish_reason) for name, each in outputs.items()}
    assert ends == {"natural": (4, "stop"), "short": (3, "length"), "ignoring": (10, "length")}


def test_a_stop_token_of_the_request_ends_it_and_is_not_part_of_it(make_engine, request_of, finish):
    engine = make_engine()
    whole = expected_token_ids([5, 6, 7], 6, engine.answer_table)
    engine.add(request_of(stop_token_ids=(whole[3],)))
    outputs = finish(engine)["a"]
    assert tokens(outputs) == whole[: whole.index(whole[3])]
    assert outputs[-1].finish_reason == "stop"


def test_a_step_takes_what_its_tokens_cost(make_engine, request_of, fake_time):
    fake_time.lateness = 0
    engine = make_engine()
    engine.add(request_of("a", [5] * 40))
    started = fake_time.now
    engine.step()
    assert fake_time.now - started == pytest.approx(0.020 + 32 * 0.0001)
    engine.step()
    engine.add(request_of("b", [6] * 10))
    started = fake_time.now
    engine.step()
    assert fake_time.now - started == pytest.approx(0.020 + 1 * 0.001 + 10 * 0.0001)


@pytest.mark.parametrize(("step_stretch", "token_count"), [(1.5, 2 + 16), (0, 2 + 30)])
def test_a_prompt_beside_a_wide_batch_comes_in_pieces(make_engine, request_of, step_stretch, token_count):
    engine = make_engine(step_stretch=step_stretch)
    for name in "ab":
        engine.add(request_of(name))
    engine.step()
    engine.step()
    engine.add(request_of("long", [5] * 30))
    engine.step()
    assert engine.load.step_token_count_last == token_count


def test_late_wakes_do_not_add_up(make_engine, request_of, finish, fake_time):
    engine = make_engine()
    engine.add(request_of(tokens=[5, 6, 7], max_tokens=100))
    started = fake_time.now
    finish(engine)
    exact = 100 * 0.020 + 3 * 0.0001 + 99 * 0.001
    assert exact <= fake_time.now - started <= exact + 2 * fake_time.lateness


def test_idle_time_and_a_long_stop_are_not_made_up_for(make_engine, request_of, finish, fake_time):
    engine = make_engine()
    engine.add(request_of(max_tokens=50))
    engine.step()
    fake_time.now += 60
    started = fake_time.now
    finish(engine)
    assert fake_time.now - started > 49 * 0.021 - 0.3
    fake_time.now += 60
    engine.add(request_of("later", max_tokens=1))
    started = fake_time.now
    engine.step()
    assert fake_time.now - started > 0.020


def test_a_step_is_given_up_for_an_unwanted_prompt_and_nothing_is_lost(make_engine, request_of, finish, fake_time):
    engine = make_engine(seconds_per_prefill_token=1.0)
    engine.add(request_of("a", [5] * 20))
    started = fake_time.now
    assert engine.step(lambda name: fake_time.now > started + 0.05) == []
    assert fake_time.now - started < 0.1
    assert tokens(finish(engine)["a"]) == expected_token_ids([5] * 20, 6, engine.answer_table)


def test_log_probabilities_have_the_chosen_token_first(make_engine, request_of, finish, with_logprobs):
    engine = make_engine()
    engine.add(request_of(sampling=with_logprobs(3)))
    engine.add(request_of("none", sampling=with_logprobs(0)))
    outputs = finish(engine)
    for output in outputs["a"]:
        assert output.logprobs == [0.0]
        assert output.top_token_ids[0][0] == output.token_ids[0]
        assert len(set(output.top_token_ids[0])) == len(output.top_logprobs[0]) == 3
    assert outputs["none"][0].top_token_ids == [[]]


def test_what_the_real_engine_refuses_is_refused(make_engine, request_of):
    engine = make_engine()
    for fields, reason in (
        ({"tokens": [64]}, "INVALID_VALUE"),
        ({"tokens": []}, "INVALID_VALUE"),
        ({"max_tokens": 0}, "INVALID_VALUE"),
        ({"tokens": [1] * 256}, "CONTEXT_LENGTH_EXCEEDED"),
    ):
        with pytest.raises(RequestRefused) as caught:
            engine.add(request_of(**fields))
        assert caught.value.reason == reason
    for index in range(8):
        engine.add(request_of(str(index)))
    for name, reason in (("0", "DUPLICATE_ID"), ("new", "QUEUE_FULL")):
        with pytest.raises(RequestRefused) as caught:
            engine.add(request_of(name))
        assert caught.value.reason == reason


def test_a_paused_sequence_counts_as_waiting_and_loses_no_token(make_engine, request_of):
    engine = make_engine(max_sequences=1, max_waiting=0)
    engine.add(request_of("batch", [9] * 5, priority=2))
    got = {"batch": [], "urgent": []}
    for moment in range(12):
        if moment == 3:
            engine.add(request_of("urgent", [8] * 5, max_tokens=2))
            engine.step()
            assert (engine.load.running, engine.load.waiting) == (1, 1)
        for output in engine.step():
            got[output.request_id] += output.token_ids
    assert got["batch"] == expected_token_ids([9] * 5, 6, engine.answer_table)
    assert engine.load.preemption_count == 0


def test_cancelling_frees_at_once(make_engine, request_of):
    engine = make_engine()
    engine.add(request_of())
    engine.step()
    assert engine.cancel("a")
    assert not engine.cancel("a")
    assert (engine.load.free_block_count, engine.has_work) == (64, False)


def test_a_model_that_is_not_there_is_named(make_engine, tmp_path):
    with pytest.raises(ModelLoadError, match="no such file"):
        make_engine(model_path=str(tmp_path / "none.gguf"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"model\.vocab"):
        make_engine()


def test_the_simulation_needs_no_torch():
    code = (
        f"import sys; sys.path[:0] = {[str(MODELS / name) for name in ('llm_sim', 'llm/1', 'llm')]!r}\n"
        "import simulated_engine; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "llm_engine.batcher" in done.stdout.split()
    assert "torch" not in done.stdout.split()
