"""The GPU's kernel for mixtures of experts and for eight-bit floats against torch, on a CPU by Triton's interpreter."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

# Read when the kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

from llm_engine.architecture import Experts
from llm_engine.blocks import Floats8
from llm_engine.gpu_products import GpuExperts, multiplied
from llm_engine.matmul import Compute, Projection
from llm_engine.mlp import EachExpert, ExpertMixture, Mlp
from llm_engine.rowwise import Norm

PLAIN = Compute(torch.device("cpu"), torch.float32, torch.float32, torch.float32, kernels=None)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def both(count: int, hidden: int, inner: int, here: range) -> tuple[EachExpert, GpuExperts]:
    """The experts of a rank, of `count` in all."""
    gate_up, down = random(count, 2 * inner, hidden, seed=1), random(count, hidden, inner, seed=2)
    mlps = [Mlp(Projection(gate_up[each], PLAIN), Projection(down[each], PLAIN)) for each in here]
    own = slice(here.start, here.stop)
    return EachExpert(mlps, here), GpuExperts(gate_up[own].flatten(0, 1), down[own].flatten(0, 1), here)


def floats8(weight: torch.Tensor, group: int) -> Floats8:
    """A weight rounded to eight bits."""
    groups = -(-weight.shape[1] // group)
    scales = random(len(weight), groups, seed=11).abs() + 0.1
    spread = scales.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    return Floats8((weight / spread).to(torch.float8_e4m3fn), scales, group)


def added(routed, rows: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    onto = random(*rows.shape, seed=9)
    routed.add(rows.clone(), chosen, shares, onto)
    return onto


@pytest.mark.parametrize("row_count", [1, 3, 40, 300])
@pytest.mark.parametrize("here", [range(8), range(2, 5), range(7, 8)], ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(48, 40), (130, 17)])
def test_rows_go_through_their_experts_as_one_after_the_other(row_count, here, hidden, inner):
    each, grouped = both(8, hidden, inner, here)
    rows = random(row_count, hidden, seed=row_count)
    scores = random(row_count, 8, seed=4)
    scores[:, 3] -= 10.0  # Nobody's choice.
    shares, chosen = scores.softmax(dim=1).topk(2, dim=1)
    expected = added(each, rows, chosen, shares)
    assert (added(grouped, rows, chosen, shares) - expected).abs().max() < 1e-5


def test_one_expert_may_have_all_rows():
    each, grouped = both(4, 32, 16, range(4))
    rows, chosen = random(200, 32, seed=3), torch.full((200, 1), 2)
    shares = torch.ones(200, 1)
    assert (added(grouped, rows, chosen, shares) - added(each, rows, chosen, shares)).abs().max() < 1e-5


@pytest.mark.parametrize("row_count", [1, 16, 17, 150])
@pytest.mark.parametrize(("output_size", "input_size", "group"), [(70, 200, 128), (64, 64, 32), (130, 40, 16)])
def test_rows_are_multiplied_with_eight_bit_floats_as_with_their_values(row_count, output_size, input_size, group):
    weight = floats8(random(output_size, input_size, seed=1), group)
    rows = random(row_count, 2 * input_size, seed=2)[:, :input_size]
    expected = rows.double() @ weight.dense().double().T
    assert (multiplied(rows, weight) - expected).abs().max() < 1e-5
    product = Projection(weight, PLAIN, bias=torch.ones(output_size))
    assert (product(rows, onto=torch.ones(row_count, output_size)) - 2 - expected).abs().max() < 1e-5
    # Of 16-bit types the interpreter multiplies this one alone.
    assert (multiplied(rows.half(), weight).double() - expected).abs().max() < 0.01


@pytest.mark.parametrize("row_count", [3, 100])
def test_experts_of_eight_bit_floats_are_those_of_their_values(row_count):
    gate_up, down = floats8(random(4 * 2 * 24, 48, seed=1), 16), floats8(random(4 * 48, 24, seed=2), 32)
    narrow, wide = (GpuExperts(*each, range(4)) for each in ((gate_up, down), (gate_up.dense(), down.dense())))
    shares, chosen = random(row_count, 4, seed=4).softmax(dim=1).topk(2, dim=1)
    rows = random(row_count, 48, seed=5)
    assert (added(narrow, rows, chosen, shares) - added(wide, rows, chosen, shares)).abs().max() < 1e-5


def test_a_row_with_nan_harms_no_other():
    _, grouped = both(4, 32, 16, range(4))
    rows = random(20, 32, seed=3)
    rows[7] = float("nan")
    chosen = torch.stack([torch.arange(20) % 4, (torch.arange(20) + 1) % 4], dim=1)
    found = added(grouped, rows, chosen, torch.full((20, 2), 0.5))
    assert found[7].isnan().all()
    assert found[torch.arange(20) != 7].isfinite().all()


def test_a_mixture_waits_for_nothing_that_the_device_computes(monkeypatch):
    experts = Experts(
        layers=frozenset([0]),
        count=8,
        per_row=2,
        intermediate_size=16,
        scoring="sigmoid",
        renormalizes=True,
        scale=2.5,
        has_choice_bias=True,
        group_count=4,
        groups_per_row=2,
        group_score_count=2,
    )
    rows, norm = random(20, 32, seed=5), Norm(torch.ones(32), 1e-6)
    made = [
        ExpertMixture(experts, router=random(8, 32, seed=6), choice_bias=random(8, seed=7), routed=routed, shared=None)
        for routed in both(8, 32, 16, range(8))
    ]
    # The interpreter itself reads on the host what a kernel reads; what is launched does not depend on it.
    monkeypatch.setattr("llm_engine.gpu_products._launch", lambda *arguments, **fields: None)
    # Numbers that are not there cannot be read.
    with FakeTensorMode(allow_non_fake_inputs=True) as without_numbers:
        assert made[1](without_numbers.from_tensor(rows), norm=norm).shape == rows.shape
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            made[0](without_numbers.from_tensor(rows), norm=norm)
    monkeypatch.undo()
    assert (made[1](rows, norm=norm) - made[0](rows, norm=norm)).abs().max() < 1e-5
