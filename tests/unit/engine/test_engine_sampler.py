"""Choosing the next token."""

import numpy as np
import pytest
import torch

from llm_engine.random_stream import uniforms
from llm_engine.request import SamplingParams
from llm_engine.sampler import SampledToken, SamplingRow, _truncated, draw

VOCABULARY = 1000


def logits_of(rows: int, *, seed: int = 0, spread: float = 3.0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def row(seed: int = 0, *, prompt: tuple = (1, 2), output: tuple = (), **params) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), seed, [*prompt, *output], len(prompt))


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[SampledToken]:
    return draw(logits, rows).read()


MIXED = [
    row(1, temperature=0.0),
    row(2, temperature=0.7, top_k=5),
    row(3, temperature=1.3, top_p=0.8, logprobs=3),
    row(4, output=(5, 5, 9), frequency_penalty=1.0, presence_penalty=0.5),
    row(5, output=(7,), repetition_penalty=1.4, logprobs=0),
    row(6, temperature=2.0, top_k=400, top_p=0.99),
    row(7),
    row(8, temperature=0.9, min_p=0.1),
    row(9, temperature=0.0, logit_bias={3: 8.0, 4: -2.0}, logprobs=1),
    row(10, logit_bias={5: 6.0}, top_k=20, min_p=0.05, output=(5,), presence_penalty=1.0),
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


@pytest.mark.parametrize("sorts_all", [False, True])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_truncation_keeps_what_the_definition_keeps(spread, sorts_all):
    cases = [(0, 0.5), (0, 0.9), (0, 0.999), (1, 1.0), (7, 1.0), (50, 0.3), (600, 0.95), (5000, 0.7)]
    cases += [(0, 1e-9), (300, 1.0)]
    logits = logits_of(len(cases), seed=4, spread=spread)
    rows = [row(top_k=k, top_p=p) for k, p in cases]
    kept = torch.isfinite(_truncated(logits, rows, sorts_all=sorts_all))
    for index, (k, p) in enumerate(cases):
        assert set(kept[index].nonzero().flatten().tolist()) == kept_by_definition(logits[index].numpy(), k, p), (k, p)


def test_truncated_tokens_are_never_drawn():
    logits = logits_of(1, seed=2, spread=1.0)
    allowed = set(logits[0].topk(3).indices.tolist())
    drawn = sample(logits.expand(500, -1), [row(seed, top_k=3, temperature=3.0) for seed in range(500)])
    assert {token.token_id for token in drawn} == allowed


def drawn_by_definition(logits: np.ndarray, row: SamplingRow) -> int:
    """The whole of sampling, as its order is told, for one row."""
    params, logits = row.params, logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in set(row.token_ids):
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token in row.token_ids[row.prompt_token_count :]:
        logits[token] -= params.frequency_penalty
    for token in set(row.token_ids[row.prompt_token_count :]):
        logits[token] -= params.presence_penalty
    if params.temperature == 0.0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / params.temperature
    weights = np.zeros_like(scaled)
    kept = list(kept_by_definition(scaled, params.top_k, params.top_p))
    weights[kept] = np.exp(scaled[kept])
    weights[weights < params.min_p * weights.max()] = 0.0
    number = uniforms([row.seed], [row.output_position])[0]
    return int(np.searchsorted(weights.cumsum(), number * weights.sum(), side="right"))


def test_every_row_draws_what_the_definition_draws():
    chance = np.random.default_rng(3)
    rows = []
    for seed in range(300):
        output = chance.integers(0, 60, 5).tolist()
        params = {
            "temperature": float(chance.choice([0.0, 0.6, 1.0, 1.8])),
            "top_k": int(chance.choice([0, 3, 40])),
            "top_p": float(chance.choice([0.5, 0.95, 1.0])),
            "min_p": float(chance.choice([0.0, 0.0, 0.02, 0.2, 0.9])),
            "repetition_penalty": float(chance.choice([1.0, 1.3])),
            "presence_penalty": float(chance.choice([0.0, 0.7])),
            "logit_bias": {int(token): float(chance.uniform(-6, 6)) for token in chance.integers(0, 60, seed % 4)},
        }
        rows.append(row(seed, output=tuple(output), **params))
    logits = logits_of(len(rows), seed=11, spread=2.0, vocabulary=60)
    expected = [drawn_by_definition(logits[index].numpy(), each) for index, each in enumerate(rows)]
    assert [token.token_id for token in sample(logits, rows)] == expected


def test_min_p_leaves_what_is_likely_enough_beside_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for min_p, expected in ((0.0, {0, 1, 2, 3}), (0.05, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.5, {0, 1}), (1.0, {0})):
        drawn = sample(logits.expand(400, 4), [row(seed, min_p=min_p) for seed in range(400)])
        assert {token.token_id for token in drawn} == expected, min_p


def test_min_p_1_is_greedy():
    logits = logits_of(20, seed=5)
    drawn = sample(logits, [row(seed, min_p=1.0, temperature=5.0) for seed in range(20)])
    assert [token.token_id for token in drawn] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forbids_and_forces_and_the_logprobs_stay_the_models_own(temperature):
    logits = logits_of(1, seed=6)
    best = int(logits.argmax())
    plain = logits[0].log_softmax(-1)
    forced = sample(logits, [row(temperature=temperature, logit_bias={77: 100.0}, logprobs=1)])[0]
    assert (forced.token_id, forced.top_token_ids) == (77, [best])
    assert forced.logprob == pytest.approx(float(plain[77]))
    forbidden = {sample(logits, [row(seed, temperature=temperature, logit_bias={best: -100.0})])[0].token_id
                 for seed in range(50)}  # fmt: skip
    assert best not in forbidden


def test_a_bias_counts_before_penalties():
    # (1 + 2.9) / 2 is below 2, and 1 / 2 + 2.9 would be above it.
    biased = row(prompt=(0,), temperature=0.0, repetition_penalty=2.0, logit_bias={0: 2.9})
    assert sample(torch.tensor([[1.0, 2.0]]), [biased])[0].token_id == 1


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
