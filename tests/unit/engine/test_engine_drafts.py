"""Drafts from a sequence's own text: what is guessed, and that answers are those of single tokens."""

import dataclasses
import random

import pytest
import torch

from llm_engine import EngineConfig, SamplingParams, SequenceRequest
from llm_engine.drafts import REST_TOKENS, WINDOW_TOKENS, Drafter, continued
from llm_engine.sequence import Sequence

GREEDY = SamplingParams(temperature=0.0)
# Peaked enough that a tiny random model repeats itself.
PEAKED = SamplingParams(temperature=0.25, seed=3)
WORDS = [11, 12, 13, 14, 15, 16]


def request(name: str = "a", tokens=(5, 6, 7), **fields) -> SequenceRequest:
    defaults = {"max_tokens": 40, "sampling": GREEDY, "ignore_eos": True}
    return SequenceRequest(request_id=name, token_ids=list(tokens), **{**defaults, **fields})


def sequence(tokens: list[int], prompt_token_count: int | None = None, **fields) -> Sequence:
    return Sequence(request("a", tokens, **fields), 0, tokens, prompt_token_count or len(tokens), 0, frozenset())


def finish(engine, *requests) -> dict[str, tuple[list[int], str, int]]:
    """Tokens, why they end, and their count as the last output tells it."""
    for each in requests:
        engine.add(each)
    found = {each.request_id: ([], "", 0) for each in requests}
    for _ in range(2000):
        if not engine.has_work:
            return found
        for output in engine.step():
            tokens, ended, _ = found[output.request_id]
            assert not ended, "nothing follows a finished output"
            found[output.request_id] = (tokens + output.token_ids, output.finish_reason, output.output_token_count)
    raise AssertionError("the engine does not come to an end")


def texts(found: dict[str, tuple[list[int], str, int]]) -> dict[str, list[int]]:
    return {name: tokens for name, (tokens, _, _) in found.items()}


def prompts(count: int, longest: int = 30) -> list[list[int]]:
    source = random.Random(0)
    return [source.choices(range(96), k=source.randint(1, longest)) for _ in range(count)]


@pytest.fixture
def make_drafting(make_engine):
    """An engine that drafts for many sequences, and one that never does."""

    def make(speculation_tokens: int, **settings):
        return make_engine(speculation_tokens=speculation_tokens, speculation_sequences=8, **settings)

    return make


@pytest.fixture
def make_counting_folder(make_folder, tiny_tensors):
    """A model that says 0 to 7 again and again: of each token it knows nothing but itself."""

    def make():
        following = torch.arange(96)
        following[:8] = torch.arange(1, 9) % 8
        embedding = tiny_tensors["model.embed_tokens.weight"]
        head = torch.zeros_like(embedding)
        head[following] = torch.nn.functional.normalize(embedding)
        silent = {
            name: torch.zeros_like(tiny_tensors[name]) for name in tiny_tensors if "o_proj" in name or "down" in name
        }
        return make_folder(tensors={"lm_head.weight": head, **silent})

    return make


@pytest.fixture
def guess(monkeypatch):
    """Let drafts be what known texts go on with, each token wrong with some probability."""

    def use(known: list[list[int]], wrong: float = 0.0) -> None:
        source = random.Random(1)

        def guessed(token_ids: list[int], count: int) -> list[int]:
            rest = next((text[len(token_ids) :] for text in known if text[: len(token_ids)] == token_ids), [])
            return [token if source.random() >= wrong else source.randrange(96) for token in rest[:count]]

        monkeypatch.setattr("llm_engine.drafts.continued", guessed)

    return use


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([1, 2, 3, 4, 5, 9, 2, 3], [4, 5, 9, 2]),
        ([1, 2, 3, 4, 9, 2, 3, 7, 8, 1, 2, 3], [4, 9, 2, 3]),
        ([2, 3, 4, 9, 2, 3, 7, 8, 6, 2, 3], [7, 8, 6, 2]),
        ([5, 5, 5], [5, 5, 5, 5]),
        ([7, 8, 7, 8, 7], [8, 7, 8, 7]),
        ([1, 2, 3, 4, 2], []),
        ([1, 2, 3, 4], []),
        ([1], []),
        ([6, 7] + [0, 1, 2] * (WINDOW_TOKENS // 3) + [6, 7], []),
    ],
    ids=["what followed", "longest match", "latest match", "one token", "period", "one word is no match", "nothing new",
         "one token alone", "too far back"],
)  # fmt: skip
def test_drafts_are_what_followed_before(tokens, drafts):
    assert continued(tokens, 4) == drafts


def test_drafts_leave_room_for_the_token_that_follows_them():
    drafter = Drafter(4, context_token_count=100)
    assert len(drafter.propose(sequence([5] * 10), 9)) == 4
    assert len(drafter.propose(sequence([5] * 10), 3)) == 3
    assert len(drafter.propose(sequence([5] * 97), 9)) == 2
    assert drafter.propose(sequence([5] * 99), 9) == []
    assert len(drafter.propose(sequence([5] * 10, 2, max_tokens=10), 9)) == 1
    assert drafter.propose(sequence([5] * 10, 2, max_tokens=9), 9) == []


def test_nothing_is_drafted_where_rows_depend_on_more_than_tokens():
    drafter = Drafter(4, context_token_count=100)
    for sampling in (SamplingParams(json_schema="{}"), SamplingParams(logprobs=0)):
        assert drafter.propose(sequence([5] * 10, sampling=sampling), 9) == []


def test_a_sequence_whose_drafts_are_wrong_drafts_seldom_and_one_whose_are_right_always():
    drafter = Drafter(4, context_token_count=10_000)
    wrong, right = sequence([5] * 10, max_tokens=5000), sequence([5] * 10, max_tokens=5000)
    counts = [0, 0]
    for _ in range(1000):
        for index, (each, accepted) in enumerate(((wrong, 0), (right, 4))):
            if drafts := drafter.propose(each, 9):
                counts[index] += 1
                drafter.learn(each, len(drafts), accepted)
            each.token_ids.append(5)
    assert counts[0] <= 2 + 1000 / REST_TOKENS
    assert counts[1] == 1000
    assert (drafter.drafted_token_total, drafter.accepted_token_total) == (4 * sum(counts), 4000)


@pytest.mark.parametrize("cpu_kernels", [True, False], ids=["by kernels", "by torch"])
def test_text_that_repeats_takes_fewer_steps_and_is_the_same(make_drafting, make_counting_folder, cpu_kernels):
    path = make_counting_folder()
    plain, drafting = (make_drafting(count, model_path=path, cpu_kernels=cpu_kernels) for count in (0, 4))
    asked = request(tokens=[7], max_tokens=80)
    assert finish(plain, asked)["a"][0] == [index % 8 for index in range(80)]
    assert finish(drafting, asked) == finish(plain, asked)
    assert drafting.load.accepted_token_total > 50
    assert drafting.load.step_count == 80 - drafting.load.accepted_token_total
    assert drafting.load.generated_token_total == 80
    assert plain.load.drafted_token_total == 0


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        PEAKED,
        dataclasses.replace(PEAKED, temperature=0.8, top_p=0.9, top_k=5),
        dataclasses.replace(PEAKED, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1),
        dataclasses.replace(GREEDY, frequency_penalty=0.3, logit_bias={7: 3.0, 9: -100.0}),
    ],
    ids=["greedy", "drawn", "truncated", "penalties", "bias"],
)
@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_answers_are_those_of_single_tokens_whatever_is_guessed(make_drafting, guess, sampling, wrong):
    requests = [request(str(index), tokens, sampling=sampling) for index, tokens in enumerate(prompts(6))]
    plain, drafting = make_drafting(0), make_drafting(4, step_token_budget=40)
    expected = finish(plain, *requests)
    guess([[*each.token_ids, *expected[each.request_id][0]] for each in requests], wrong)
    assert finish(drafting, *requests) == expected
    accepted, drafted = drafting.load.accepted_token_total, drafting.load.drafted_token_total
    assert accepted == drafted > 0 if wrong == 0 else 0 < accepted < drafted


@pytest.mark.parametrize("cpu_kernels", [True, False], ids=["by kernels", "by torch"])
@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_a_window_hides_from_drafts_what_it_hides_from_single_tokens(make_drafting, guess, wrong, cpu_kernels):
    window = {"attention_window": 14, "attention_window_from": 40, "attention_sinks": 3, "cpu_kernels": cpu_kernels}
    requests = [request(str(index), tokens, max_tokens=70) for index, tokens in enumerate(prompts(4))]
    expected = finish(make_drafting(0, **window), *requests)
    guess([[*each.token_ids, *expected[each.request_id][0]] for each in requests], wrong)
    drafting = make_drafting(4, step_token_budget=40, **window)
    assert finish(drafting, *requests) == expected
    assert finish(drafting, *requests) == expected, "from the blocks that are known by now"
    assert drafting.load.accepted_token_total > 50
    assert drafting.load.free_block_count == drafting.load.total_block_count


def test_answers_end_inside_right_guesses_as_they_do_without(make_drafting, guess):
    plain, drafting = make_drafting(0, max_context_tokens=60), make_drafting(4, max_context_tokens=60)
    whole = finish(plain, request(sampling=PEAKED, max_tokens=57))["a"][0]
    guess([[5, 6, 7, *whole]])
    asked = [request(sampling=PEAKED, max_tokens=count) for count in (*range(1, 12), 57, 100)]
    asked += [
        request(sampling=PEAKED, ignore_eos=False, stop_token_ids=(whole[place],), max_tokens=57) for place in range(12)
    ]
    for each in asked:
        assert finish(drafting, each) == finish(plain, each)
        assert drafting.load.free_block_count == drafting.load.total_block_count
    assert drafting.load.accepted_token_total > 50


def test_preempted_and_paused_sequences_get_what_they_would_have_got(make_drafting):
    requests = [
        request(str(index), tokens, max_tokens=30, sampling=PEAKED if index % 2 else GREEDY, priority=index % 3)
        for index, tokens in enumerate(prompts(8, longest=20))
    ]
    tight = make_drafting(4, kv_cache_bytes=2048 * 18, step_token_budget=40)
    assert finish(tight, *requests) == finish(make_drafting(0), *requests)
    assert tight.load.preemption_count > 0
    assert tight.load.accepted_token_total > 0
    assert tight.load.free_block_count == tight.load.total_block_count


def test_a_resumed_or_repeated_answer_reuses_no_wrong_guess(make_drafting, guess):
    plain, drafting = make_drafting(0), make_drafting(4)
    asked = request(sampling=PEAKED)
    answer = finish(plain, asked)["a"][0]
    guess([[5, 6, 7, *answer]], 0.5)
    assert finish(drafting, asked)["a"][0] == answer
    again = request(tokens=[5, 6, 7, *answer[:30]], prior_output_count=30, sampling=PEAKED)
    assert finish(drafting, again)["a"][0] == answer[30:]
    assert drafting.load.cached_token_total > 20


def test_two_ranks_say_the_same_with_drafts(make_drafting):
    alone, ranks = make_drafting(0), make_drafting(4, tensor_parallel_size=2)
    try:
        asked = request(tokens=WORDS * 4)
        assert finish(ranks, asked) == finish(alone, asked)
        assert ranks.load.accepted_token_total > 0
    finally:
        ranks.close()


def test_few_sequences_draft_and_many_do_not(make_engine):
    engine = make_engine(speculation_sequences=2)
    finish(engine, *(request(str(index), WORDS * 4, max_tokens=20) for index in range(3)))
    assert engine.load.drafted_token_total == 0
    finish(engine, *(request(str(index), WORDS * 4, max_tokens=20) for index in range(2)))
    assert engine.load.drafted_token_total > 0


def test_rows_of_drafts_count_in_a_steps_budget_and_as_decodes_for_its_pace(make_engine):
    seen = []

    class Recorder:
        def prompt_token_bound(self, decode_count):
            return None

        def observe(self, decode_count, prompt_token_count, seconds):
            seen.append((decode_count, prompt_token_count))

    engine = make_engine(step_token_budget=8)
    engine._pacer = Recorder()
    finish(engine, request(tokens=WORDS * 4))
    assert seen[:3] == [(0, 8)] * 3
    assert {prompt_count for _, prompt_count in seen[3:]} == {0}
    assert 1 < max(decode_count for decode_count, _ in seen) <= 5


@pytest.mark.parametrize("cpu_kernels", [True, False], ids=["by kernels", "by torch"])
def test_a_wrong_guess_that_is_not_finite_harms_nobody(make_engine, guess, monkeypatch, cpu_kernels):
    engine = make_engine(kv_cache_bytes=2048 * 12, cpu_kernels=cpu_kernels)
    sound = texts(finish(engine, request("a"), request("b", [8, 9])))
    unsaid = next(token for token in range(10, 96) if not any(token in tokens for tokens in sound.values()))
    embedding = engine._rank.model._embedding
    embedding._weight = embedding._weight.clone()
    embedding._weight[unsaid] = float("nan")
    monkeypatch.setattr("llm_engine.drafts.continued", lambda token_ids, count: [token_ids[-1], unsaid][:count])
    assert texts(finish(engine, request("a"), request("b", [8, 9]))) == sound
    assert engine.load.preemption_count == 2
    guess([])
    assert texts(finish(engine, request("a"), request("b", [8, 9]))) == sound


def test_settings_out_of_their_bounds_are_named():
    with pytest.raises(ValueError, match=r"speculation_tokens is 65, .* 0 to 64; speculation_sequences is 0, .* 1 to"):
        EngineConfig(model_path="x", speculation_tokens=65, speculation_sequences=0)
