"""Choosing the next token."""

import numpy as np
import pytest
import torch

from llm_engine.random_stream import uniforms
from llm_engine.request import SamplingParams
from llm_engine.sampler import SamplingRow, _truncated, sample

VOCABULARY = 1000


def logits_of(rows: int, *, seed: int = 0, spread: float = 3.0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def row(seed: int = 0, *, prompt: tuple = (1, 2), output: tuple = (), **params) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), seed, [*prompt, *output], len(prompt))


MIXED = [
    row(1, temperature=0.0),
    row(2, temperature=0.7, top_k=5),
    row(3, temperature=1.3, top_p=0.8, logprobs=3),
    row(4, output=(5, 5, 9), frequency_penalty=1.0, presence_penalty=0.5),
    row(5, output=(7,), repetition_penalty=1.4, logprobs=0),
    row(6, temperature=2.0, top_k=400, top_p=0.99),
    row(7),
]


def test_a_row_gets_the_same_in_any_company():
    logits = logits_of(len(MIXED))
    together = sample(logits, MIXED)
    alone = [sample(logits[i : i + 1], [each])[0] for i, each in enumerate(MIXED)]
    assert [token.token_id for token in together] == [token.token_id for token in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.top_token_ids == other.top_token_ids
        assert one.logprob == pytest.approx(other.logprob) if one.logprob is not None else True


def test_sampling_leaves_the_logits_as_they_were():
    logits = logits_of(len(MIXED))
    before = logits.clone()
    sample(logits, MIXED)
    assert torch.equal(logits, before)


def test_the_draw_depends_on_the_output_position_alone_and_not_on_the_prompt_length():
    logits = logits_of(1)
    short = sample(logits, [row(9, prompt=(1,), output=(4, 4))])[0]
    long = sample(logits, [row(9, prompt=(1, 2, 3, 4), output=(8, 8))])[0]
    assert short.token_id == long.token_id


def test_seeds_and_positions_give_different_draws():
    logits = torch.zeros(1, VOCABULARY)
    by_seed = {sample(logits, [row(seed)])[0].token_id for seed in range(50)}
    by_position = {sample(logits, [row(0, output=(0,) * n)])[0].token_id for n in range(50)}
    assert len(by_seed) > 40 and len(by_position) > 40


def test_the_random_stream_is_pinned():
    # A resumed request may go to a replica of another version: these numbers are part of the contract.
    assert uniforms([0, 0, 1, -1, 2**64 - 1], [0, 1, 0, 7, 7]).tolist() == [
        0.6524484863740321,
        0.7012121095215251,
        0.36818951565166946,
        0.7238582745899125,
        0.7238582745899125,
    ]


def test_the_random_stream_is_even():
    numbers = uniforms([3] * 100_000, list(range(100_000)))
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(counts - 5000).max() < 350
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    count = 20_000
    rows = [row(seed, temperature=temperature) for seed in range(count)]
    drawn = [token.token_id for token in sample(logits.expand(count, 4), rows)]
    expected = (logits[0] / temperature).softmax(-1).numpy()
    assert np.abs(np.bincount(drawn, minlength=4) / count - expected).max() < 0.015


def test_greedy_takes_the_likeliest_and_so_does_a_vanishing_temperature():
    logits = logits_of(3)
    best = logits.argmax(-1).tolist()
    assert [t.token_id for t in sample(logits, [row(temperature=0.0)] * 3)] == best
    assert [t.token_id for t in sample(logits, [row(temperature=1e-40)] * 3)] == best
    assert [t.token_id for t in sample(logits, [row(temperature=2e-5)] * 3)] == best


def kept_by_definition(scaled: np.ndarray, top_k: int, top_p: float) -> set[int]:
    order = np.argsort(-scaled, kind="stable")[: top_k or None]
    weights = np.exp(scaled[order].astype(np.float64))
    before = np.cumsum(weights) - weights
    return set(order[(before < top_p * weights.sum()) | (top_p >= 1)].tolist())


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_truncation_keeps_what_the_definition_keeps(spread):
    cases = [(0, 0.5), (0, 0.9), (0, 0.999), (1, 1.0), (7, 1.0), (50, 0.3), (600, 0.95), (5000, 0.7)]
    cases += [(0, 1e-9), (300, 1.0)]
    logits = logits_of(len(cases), seed=4, spread=spread)
    rows = [row(top_k=k, top_p=p) for k, p in cases]
    kept = torch.isfinite(_truncated(logits, rows))
    for index, (k, p) in enumerate(cases):
        assert set(kept[index].nonzero().flatten().tolist()) == kept_by_definition(logits[index].numpy(), k, p), (k, p)


def test_truncated_tokens_are_never_drawn():
    logits = logits_of(1, seed=2, spread=1.0)
    allowed = set(logits[0].topk(3).indices.tolist())
    drawn = sample(logits.expand(500, -1), [row(seed, top_k=3, temperature=3.0) for seed in range(500)])
    assert {token.token_id for token in drawn} == allowed


def test_penalties_act_on_the_tokens_they_are_defined_for():
    logits = torch.tensor([[4.0, 3.9, -1.0, -1.05]])

    def best(**settings) -> int:
        return sample(logits, [row(temperature=0.0, **settings)])[0].token_id

    assert best(prompt=(2,), output=()) == 0
    assert best(prompt=(0,), output=(), repetition_penalty=1.1) == 1
    assert best(prompt=(0,), output=(), frequency_penalty=2.0, presence_penalty=2.0) == 0
    assert best(prompt=(2,), output=(0,), presence_penalty=0.2) == 1
    assert best(prompt=(2,), output=(0, 0, 1), frequency_penalty=0.2) == 1
    assert best(prompt=(2,), output=(0, 1), frequency_penalty=0.2) == 0
    negative = torch.tensor([[-1.0, -1.05]])
    penalised = row(prompt=(0,), temperature=0.0, repetition_penalty=1.1)
    assert sample(negative, [penalised])[0].token_id == 1


def test_logprobs_are_of_the_distribution_before_penalties_and_temperature():
    logits = logits_of(2)
    rows = [row(3, output=(5,), temperature=0.2, presence_penalty=2.0, top_k=2, logprobs=4), row(logprobs=0)]
    first, second = sample(logits, rows)
    expected = logits.double().log_softmax(-1)
    assert first.logprob == pytest.approx(expected[0, first.token_id].item(), abs=1e-4)
    assert first.top_token_ids == expected[0].topk(4).indices.tolist()
    assert first.top_logprobs == pytest.approx(expected[0].topk(4).values.tolist(), abs=1e-4)
    assert second.logprob == pytest.approx(expected[1, second.token_id].item(), abs=1e-4)
    assert (second.top_token_ids, second.top_logprobs) == ([], [])
    assert sample(logits[:1], [row()])[0].logprob is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(bad):
    logits = logits_of(3)
    sound = sample(logits, [row(1), row(2, top_p=0.5), row(3, logprobs=2)])
    logits[1, 17] = bad
    tokens = sample(logits, [row(1), row(2, top_p=0.5), row(3, logprobs=2)])
    assert [token.finite for token in tokens] == [True, False, True]
    assert (tokens[0], tokens[2]) == (sound[0], sound[2])
