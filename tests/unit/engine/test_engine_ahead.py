"""A device is given its next step before the last one's tokens are read: the answers are the same. No GPU is here,
so that a CPU does as if: it computes the early steps when they are begun."""

import random

import pytest

from llm_engine import SamplingParams, SequenceRequest

GREEDY = SamplingParams(temperature=0.0)


def request(name: str, tokens=(5, 6, 7), max_tokens=20, sampling=GREEDY, **fields) -> SequenceRequest:
    fields = {"ignore_eos": True, **fields}
    return SequenceRequest(request_id=name, token_ids=[*tokens], max_tokens=max_tokens, sampling=sampling, **fields)


def random_requests(seed: int, count: int) -> list[SequenceRequest]:
    """Some greedy, some drawn, some with penalties, stop tokens, grammars and priorities."""
    rng = random.Random(seed)
    quick = (
        GREEDY,
        SamplingParams(temperature=1.0, seed=seed),
        SamplingParams(temperature=0.8, min_p=0.01, logit_bias={5: 2.0}, seed=seed + 1),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=seed + 1),
        SamplingParams(temperature=1.0, seed=seed, logprobs=2),
    )
    known_first = (
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, presence_penalty=0.5, seed=seed),
    )
    return [
        request(
            f"{index}",
            tokens=[rng.randrange(3, 96) for _ in range(rng.randrange(1, 30))],
            max_tokens=rng.randrange(1, 40),
            # Seldom, since nothing is begun early while one runs.
            sampling=rng.choice(known_first if index % 8 == 7 else quick),
            stop_token_ids=rng.sample(range(96), 4),
            ignore_eos=rng.random() < 0.5,
            priority=rng.randrange(3),
        )
        for index in range(count)
    ]


@pytest.fixture
def make_ahead(make_engine):
    """An engine that begins steps early, or not; it counts those."""

    def make(is_ahead=True, **settings):
        engine = make_engine(**{"speculation_tokens": 0, **settings})
        engine._runs_ahead = is_ahead
        engine.early_step_count = 0
        begin = engine._begin_after

        def begin_and_count(step):
            begun = begin(step)
            engine.early_step_count += begun is not None
            return begun

        engine._begin_after = begin_and_count
        return engine

    return make


def finish(engine, *requests, arrivals=(), cancels=()):
    """All outputs by name, of requests that come at once or one in every few steps, some cancelled at a length."""
    for each in requests:
        engine.add(each)
    coming, found, cancels = list(arrivals), {}, dict(cancels)
    steps = 0
    while engine.has_work or coming:
        steps += 1
        assert steps < 3000
        if coming and steps % 6 == 1 and engine.load.running + engine.load.waiting < 8:
            engine.add(coming.pop(0))
        for output in engine.step():
            name = output.request_id
            found.setdefault(name, []).append((output.token_ids, output.logprobs, output.finish_reason))
            if len(found[name]) == cancels.get(name):
                engine.cancel(name)
    return found


def tokens_of(found):
    return {name: [token for tokens, _, _ in parts for token in tokens] for name, parts in found.items()}


@pytest.mark.parametrize("settings", [{}, {"kv_cache_bytes": 2048 * 30}, {"prefix_reuse": False}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_the_same(make_ahead, seed, settings):
    ahead, plain = (make_ahead(is_ahead, **settings) for is_ahead in (True, False))
    cancels = {"3": 2, "6": 1, "9": 5}
    expected = finish(plain, arrivals=random_requests(seed, 24), cancels=cancels)
    found = finish(ahead, arrivals=random_requests(seed, 24), cancels=cancels)
    assert tokens_of(found) == tokens_of(expected)
    assert {name: parts[-1][2] for name, parts in found.items()} == {n: parts[-1][2] for n, parts in expected.items()}
    assert ahead.early_step_count > 20 and plain.early_step_count == 0
    assert ahead.load.free_block_count == plain.load.free_block_count == plain.load.total_block_count


def test_nothing_is_computed_beyond_an_answers_length(make_ahead):
    engine = make_ahead()
    found = finish(engine, request("a", max_tokens=6), request("b", max_tokens=4))
    assert [len(tokens) for tokens in tokens_of(found).values()] == [6, 4]
    # The prompts' step, and one for each token but the first; the second step is the first that can have one begun.
    assert engine.load.step_count == 6
    assert engine.early_step_count == 4


def test_a_sequence_that_stops_takes_no_output_of_the_step_that_was_begun(make_ahead):
    plain = make_ahead(is_ahead=False)
    said = tokens_of(finish(plain, request("a")))["a"]
    stop = next(token for token in said[2:] if token not in said[:2])
    engine = make_ahead()
    found = finish(engine, request("a", stop_token_ids=[stop], ignore_eos=False), request("b", [9, 8], max_tokens=30))
    assert tokens_of(found)["a"] == said[: said.index(stop)]
    assert found["a"][-1][2] == "stop"
    assert tokens_of(found)["b"] == tokens_of(finish(plain, request("b", [9, 8], max_tokens=30)))["b"]


def test_a_name_that_is_used_again_gets_nothing_of_the_one_before(make_ahead):
    engine, plain = make_ahead(), make_ahead(is_ahead=False)
    engine.add(request("a", [9, 8, 7]))
    while engine._ahead is None:
        engine.step()
    engine.cancel("a")
    assert tokens_of(finish(engine, request("a"))) == tokens_of(finish(plain, request("a")))


def test_a_step_that_was_begun_for_sequences_that_are_gone_does_nothing(make_ahead):
    engine = make_ahead()
    engine.add(request("a", [9, 8, 7]))
    while engine._ahead is None:
        engine.step()
    engine.cancel("a")
    assert not engine.has_work
    assert engine.load.free_block_count == engine.load.total_block_count
    generated = engine.load.generated_token_total
    assert tokens_of(finish(engine, request("b", max_tokens=3))).keys() == {"b"}
    assert engine.load.generated_token_total == generated + 3


def test_who_comes_waits_for_one_step_at_most(make_ahead):
    engine = make_ahead()
    engine.add(request("a", max_tokens=30))
    while engine._ahead is None:
        engine.step()
    engine.add(request("b"))
    first, second = ({output.request_id for output in engine.step()} for _ in range(2))
    assert first == {"a"}
    assert second == {"a", "b"}


def test_what_is_not_finite_ends_one_sequence_alone(make_ahead):
    engine = make_ahead()
    sound = tokens_of(finish(make_ahead(is_ahead=False), request("a", [5, 6]), request("b", [8, 9])))
    said = sound["b"]
    poisoned = next(token for token in said[2:] if token not in (*sound["a"], *said[:2], 5, 6, 8, 9))
    embedding = engine._rank.model._embedding
    embedding._weight = embedding._weight.clone()
    embedding._weight[poisoned] = float("nan")
    found = finish(engine, request("a", [5, 6]), request("b", [8, 9]))
    assert tokens_of(found)["a"] == sound["a"]
    assert tokens_of(found)["b"] == said[: said.index(poisoned) + 1]
    assert found["b"][-1][2] == "error"
    assert tokens_of(finish(engine, request("a", [5, 6]), request("c", [8, 10], max_tokens=2)))["a"] == sound["a"]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
    ],
    ids=lambda fields: [*fields][-1],
)
def test_what_needs_the_tokens_is_not_begun_without_them(make_ahead, fields):
    engine, plain = make_ahead(), make_ahead(is_ahead=False)
    asked = request("a", sampling=SamplingParams(**{"temperature": 0.0, "seed": 1, **fields}))
    assert finish(engine, asked) == finish(plain, asked)
    assert engine.early_step_count == 0


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 20, "min_p": 0.01}, {"logprobs": 3}],
    ids=lambda fields: [*fields][-1],
)
def test_what_only_the_device_has_to_know_is_begun_without_the_tokens(make_ahead, fields):
    engine, plain = make_ahead(), make_ahead(is_ahead=False)
    asked = request("a", sampling=SamplingParams(**{"temperature": 0.0, "seed": 1, **fields}))
    assert finish(engine, asked) == finish(plain, asked)
    assert engine.early_step_count == 18


def test_what_follows_a_grammar_is_not_begun_without_the_tokens(make_ahead, lettered_path):
    engine, plain = (make_ahead(is_ahead, model_path=lettered_path) for is_ahead in (True, False))
    sampling = SamplingParams(temperature=0.0, grammar_kind="regex", grammar="(ab|cd|ef)+")
    asked = request("a", sampling=sampling, ignore_eos=False)
    assert finish(engine, asked) == finish(plain, asked)
    assert engine.early_step_count == 0


def test_drafts_are_not_begun_without_the_tokens(make_ahead):
    engine, plain = (make_ahead(is_ahead, speculation_tokens=4) for is_ahead in (True, False))
    repeating = request("a", [5, 6, 7, 8] * 4, max_tokens=60)
    assert tokens_of(finish(engine, repeating)) == tokens_of(finish(plain, repeating))
    assert engine.load.accepted_token_total > 0
