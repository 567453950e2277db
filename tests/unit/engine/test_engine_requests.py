"""The life of a request in the engine, over a tiny model."""

import numpy as np
import pytest
import torch

from llm_engine import RequestRefused, SamplingParams, SequenceRequest, model
from llm_engine.errors import NON_FINITE_LOGITS

GREEDY = SamplingParams(temperature=0.0)


def request(name: str = "a", tokens=(5, 6, 7), **fields) -> SequenceRequest:
    defaults = {"max_tokens": 8, "sampling": GREEDY, "ignore_eos": True}
    return SequenceRequest(request_id=name, token_ids=list(tokens), **{**defaults, **fields})


def finish(engine, *requests) -> dict[str, dict]:
    """Run to the end; what each request got."""
    results = {}
    for each in requests:
        engine.add(each)
        results[each.request_id] = {"token_ids": [], "logprobs": [], "finish_reason": ""}
    for _ in range(2000):
        if not engine.has_work:
            return results
        for output in engine.step():
            result = results.setdefault(output.request_id, {"token_ids": [], "logprobs": []})
            assert result.get("finish_reason") in ("", None), "nothing follows a finished output"
            result["token_ids"] += output.token_ids
            result["logprobs"] += output.logprobs or []
            result["finish_reason"] = output.finish_reason
            result["last"] = output
    raise AssertionError("the engine does not come to an end")


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    source = np.random.default_rng(0)
    return [source.integers(0, 96, source.integers(1, longest)).tolist() for _ in range(count)]


def test_length_ends_at_max_tokens_and_at_the_context(make_engine):
    engine = make_engine(max_context_tokens=20)
    results = finish(engine, request("short"), request("long", range(15), max_tokens=100))
    assert len(results["short"]["token_ids"]) == 8
    assert len(results["long"]["token_ids"]) == 5
    assert {result["finish_reason"] for result in results.values()} == {"length"}
    assert results["long"]["last"].prompt_token_count == 15
    assert results["long"]["last"].output_token_count == 5


def test_a_stop_token_ends_the_output_and_is_not_part_of_it(make_engine):
    engine = make_engine()
    whole = finish(engine, request())["a"]["token_ids"]
    place = next(i for i in range(1, 8) if whole[i] not in whole[:i])
    sampling = SamplingParams(temperature=0.0, logprobs=1)
    stopped = finish(engine, request(ignore_eos=False, stop_token_ids=(whole[place],), sampling=sampling))["a"]
    assert stopped["token_ids"] == whole[:place]
    assert len(stopped["logprobs"]) == place
    assert stopped["finish_reason"] == "stop"


def test_the_models_own_end_token_stops_unless_ignored(make_engine, make_folder):
    free = make_engine()
    whole = finish(free, request())["a"]["token_ids"]
    engine = make_engine(make_folder({"eos_token_id": [whole[0], 2]}))
    assert engine.model_info.eos_token_ids == (whole[0], 2)
    assert finish(engine, request(ignore_eos=False))["a"]["finish_reason"] == "stop"
    assert finish(engine, request(ignore_eos=True))["a"]["token_ids"] == whole


def test_a_batch_gives_each_sequence_what_it_gets_alone(make_engine):
    engine = make_engine()
    sampling = [
        SamplingParams(temperature=0.0 if index % 2 else 0.9, seed=index, top_p=0.9, logprobs=2) for index in range(12)
    ]
    requests = [
        request(str(index), tokens, sampling=params)
        for index, (tokens, params) in enumerate(zip(prompts(12), sampling, strict=True))
    ]
    together = finish(engine, *requests)
    for each in requests:
        alone = finish(engine, each)[each.request_id]
        assert together[each.request_id]["token_ids"] == alone["token_ids"]
        assert together[each.request_id]["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-4)


def test_preempted_sequences_get_what_they_would_have_got(make_engine):
    roomy, tight = make_engine(), make_engine(kv_cache_bytes=2048 * 16)
    requests = [
        request(str(index), tokens, max_tokens=20, sampling=SamplingParams(seed=index))
        for index, tokens in enumerate(prompts(6, longest=20))
    ]
    expected, got = finish(roomy, *requests), finish(tight, *requests)
    assert roomy.load.preemption_count == 0
    assert tight.load.preemption_count > 0
    assert {k: v["token_ids"] for k, v in got.items()} == {k: v["token_ids"] for k, v in expected.items()}
    assert tight.load.free_block_count == tight.load.total_block_count


@pytest.mark.parametrize("block_count", [200, 12], ids=["keeps-its-blocks", "loses-its-blocks"])
def test_a_paused_sequence_gets_what_it_would_have_got(make_engine, block_count):
    batch = [
        request(f"batch{index}", tokens, max_tokens=20, sampling=SamplingParams(temperature=0), priority=2)
        for index, tokens in enumerate(prompts(2, longest=12))
    ]
    urgent = [
        request(f"urgent{index}", [7] * 8, max_tokens=6, sampling=SamplingParams(temperature=0)) for index in range(2)
    ]
    expected = finish(make_engine(), *batch, *urgent)
    engine = make_engine(max_sequences=2, max_waiting=0, kv_cache_bytes=1024 * (block_count + 1))
    for each in batch:
        engine.add(each)
    got: dict[str, list[int]] = {}
    for moment in range(100):
        if moment in (4, 7):
            engine.add(urgent.pop())
            assert (engine.load.running, engine.load.waiting) == (2, 1 if moment == 4 else 2)
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
    assert got == {name: result["token_ids"] for name, result in expected.items()}
    assert bool(engine.load.preemption_count) == (block_count == 12)
    assert engine.load.free_block_count == engine.load.total_block_count == block_count


def test_a_resumed_request_goes_on_as_if_it_had_never_stopped(make_engine):
    sampling = SamplingParams(
        temperature=1.2, seed=11, top_p=0.95, frequency_penalty=0.5, repetition_penalty=1.1, logprobs=1
    )
    whole = finish(make_engine(), request(sampling=sampling, max_tokens=12))["a"]
    for cut in (1, 5, 11):
        resumed = request(
            tokens=[5, 6, 7, *whole["token_ids"][:cut]],
            prior_output_count=cut,
            sampling=sampling,
            max_tokens=12,
        )
        result = finish(make_engine(), request("other", [9] * 10), resumed)["a"]
        assert result["token_ids"] == whole["token_ids"][cut:]
        assert result["logprobs"] == pytest.approx(whole["logprobs"][cut:], abs=1e-4)
        assert result["last"].prompt_token_count == 3
        assert result["last"].output_token_count == 12


def test_without_a_seed_two_requests_differ(make_engine):
    sampling = SamplingParams(temperature=5.0)
    results = finish(make_engine(), *(request(name, sampling=sampling) for name in "abc"))
    assert len({tuple(result["token_ids"]) for result in results.values()}) == 3


def test_cancelling_frees_at_once_whether_running_or_waiting(make_engine):
    engine = make_engine(max_sequences=1)
    engine.add(request("running"))
    engine.add(request("waiting"))
    engine.step()
    assert (engine.load.running, engine.load.waiting) == (1, 1)
    assert engine.cancel("waiting") and engine.cancel("running")
    assert engine.load.free_block_count == engine.load.total_block_count
    assert not engine.has_work and engine.step() == []
    assert not engine.cancel("running")


def test_a_step_is_given_up_for_an_unwanted_prompt_and_the_others_lose_nothing(make_engine, monkeypatch):
    monkeypatch.setattr(model, "_FEW_ROWS", 5)
    alone = finish(make_engine(), request("kept"))["kept"]["token_ids"]
    engine = make_engine()
    engine.add(request("kept"))
    before = [token for output in engine.step() for token in output.token_ids]
    engine.add(request("unwanted", range(30)))
    asked = []

    def leaves_in_the_second_layer(name: str) -> bool:
        asked.append(name)
        return len(asked) > 1

    assert engine.step(leaves_in_the_second_layer) == []
    assert asked == ["unwanted", "unwanted"]
    assert engine.cancel("unwanted")
    assert before + finish(engine)["kept"]["token_ids"] == alone


def refused(engine, each: SequenceRequest) -> RequestRefused:
    before = engine.load
    with pytest.raises(RequestRefused) as caught:
        engine.add(each)
    assert engine.load == before
    return caught.value


def test_a_full_engine_and_a_name_in_use_are_refused(make_engine):
    engine = make_engine(max_sequences=1, max_waiting=1)
    engine.add(request("a"))
    assert refused(engine, request("a")).reason == "DUPLICATE_ID"
    engine.add(request("b"))
    assert refused(engine, request("c")).reason == "QUEUE_FULL"
    engine.cancel("a")
    engine.add(request("a"))


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(make_engine):
    engine = make_engine(max_context_tokens=20)
    error = refused(engine, request(tokens=range(20)))
    assert error.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert "20 tokens" in error.message
    engine.add(request(tokens=range(19)))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tokens": []}, "token_ids"),
        ({"tokens": [1, 96]}, "token_ids[1] is 96"),
        ({"tokens": [-1]}, "token_ids[0] is -1"),
        ({"tokens": [0.5]}, "token_ids"),
        ({"tokens": [1 << 70]}, "token_ids"),
        ({"name": ""}, "request_id"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prior_output_count": 3}, "prior_output_count"),
        ({"prior_output_count": 2, "max_tokens": 2}, "max_tokens is 2"),
        ({"stop_token_ids": (96,)}, "stop_token_ids"),
        ({"priority": 0.5}, "priority"),
        ({"sampling": SamplingParams(temperature=-0.1)}, "temperature"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "temperature"),
        ({"sampling": SamplingParams(top_p=0.0)}, "top_p"),
        ({"sampling": SamplingParams(top_p=1.1)}, "top_p"),
        ({"sampling": SamplingParams(top_k=-1)}, "top_k"),
        ({"sampling": SamplingParams(seed=1 << 64)}, "seed"),
        ({"sampling": SamplingParams(repetition_penalty=0.0)}, "repetition_penalty"),
        ({"sampling": SamplingParams(frequency_penalty=2.5)}, "frequency_penalty"),
        ({"sampling": SamplingParams(presence_penalty=-2.5)}, "presence_penalty"),
        ({"sampling": SamplingParams(logprobs=21)}, "logprobs"),
        ({"sampling": SamplingParams(min_p=1.1)}, "min_p is 1.1, expected a number from 0.0 to 1.0"),
        ({"sampling": SamplingParams(logit_bias={96: 1.0})}, "logit_bias is 96, expected an integer from 0 to 95"),
        ({"sampling": SamplingParams(logit_bias={5: -101.0})}, "logit_bias of token 5 is -101.0"),
        ({"sampling": SamplingParams(logit_bias={5: float("nan")})}, "logit_bias of token 5 is nan"),
        ({"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1025), 0.0))}, "logit_bias has 1025 tokens"),
    ],
)
def test_a_field_out_of_bounds_is_refused_by_name(make_engine, fields, word):
    error = refused(make_engine(), request(**fields))
    assert error.reason == "INVALID_VALUE"
    assert word in error.message


def test_arrays_are_taken_as_prompts_and_the_callers_data_is_left_alone(make_engine):
    engine = make_engine()
    array = np.array([5, 6, 7], dtype=np.int32)
    given = SequenceRequest(request_id="a", token_ids=array, max_tokens=8, sampling=GREEDY, ignore_eos=True)
    assert finish(engine, given)["a"]["token_ids"] == finish(engine, request())["a"]["token_ids"]
    assert array.tolist() == [5, 6, 7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sequence_that_is_not_finite_ends_alone_and_leaves_nothing_behind(make_engine, bad):
    engine = make_engine(kv_cache_bytes=2048 * 12)
    sound = {name: result["token_ids"] for name, result in finish(engine, request("a"), request("b")).items()}
    embedding = engine._rank.model._embedding
    embedding._weight = embedding._weight.clone()
    embedding._weight[90] = bad
    results = finish(engine, request("a"), request("poison", [90] * 18), request("b"))
    assert results["poison"]["finish_reason"] == "error"
    assert results["poison"]["last"].error_reason == NON_FINITE_LOGITS
    assert {name: results[name]["token_ids"] for name in sound} == sound
    # The next owners of the same blocks see nothing of it.
    for name in sound:
        assert finish(engine, request(name))[name]["token_ids"] == sound[name]
    assert engine.load.free_block_count == engine.load.total_block_count


def test_the_load_counts_what_was_done(make_engine):
    ticks = iter(range(1000))
    from llm_engine import Engine

    engine = Engine(make_engine().config, clock=lambda: next(ticks))
    finish(engine, request("a", range(30)), request("b"))
    load = engine.load
    assert load.prompt_token_total == 33
    assert load.generated_token_total == 16
    assert load.step_seconds_last == 1
    assert (load.running, load.waiting) == (0, 0)


def test_bf16_weights_give_nearly_the_fp32_distribution(make_engine):
    sampling = SamplingParams(temperature=0.0, logprobs=0)
    exact = finish(make_engine(), request(sampling=sampling, max_tokens=1))["a"]["logprobs"]
    rounded = finish(make_engine(dtype="bf16"), request(sampling=sampling, max_tokens=1))["a"]["logprobs"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.1)


def test_no_more_tokens_are_computed_in_a_step_than_its_budget(make_engine):
    engine = make_engine(step_token_budget=8)
    for index, tokens in enumerate(prompts(8)):
        engine.add(request(str(index), tokens))
    counts = []
    while engine.has_work:
        engine.step()
        counts.append(engine.load.step_token_count_last)
    assert max(counts) == 8


def test_threads_are_set_as_the_settings_say(make_engine):
    make_engine(thread_count=2)
    assert torch.get_num_threads() == 2
    make_engine(thread_count=1)
    assert torch.get_num_threads() == 1
