"""The CPU kernels against torch, and what they promise of rows and threads."""

import logging
import math
import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from llm_engine import cpu_kernels
from llm_engine.blocks import Blocks, rounded
from llm_engine.cache_layout import CacheLayout
from llm_engine.cpu_kernels import Narrowness, load_kernels
from llm_engine.matmul import Compute, Projection, compute_dtype
from llm_engine.rowwise import Norm, SwiGlu
from llm_engine.step_tensors import AttentionGroup, StepTensors
from llm_engine.window import FULL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def kernels(request, folder):
    loaded = load_kernels(folder, request.param)
    assert loaded is not None
    return loaded


@pytest.fixture(params=["its own", "bytes"])
def narrowness(request, kernels):
    """Of products, what this processor has; without any, both are exact."""
    return Narrowness.BYTES if request.param == "bytes" and kernels.narrowness else kernels.narrowness


OLDER = {"AVX2": ("avx512f", ["-mno-avx512f"]), "AVX-512": ("avx512_vnni", ["-mno-avx512vnni", "-mno-avx512bf16"])}
"""Processors without products of bytes that sum in 32 bits: what they have not, and how the compiler is told."""


@pytest.fixture(scope="module", params=OLDER)
def older_kernels(request, tmp_path_factory):
    """The kernels as an older processor has them."""
    missing, flags = OLDER[request.param]
    if f" {missing} " not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("all tests are of such kernels here, or of older ones")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "_FLAGS", (*cpu_kernels._FLAGS, *flags))
        loaded = load_kernels(tmp_path_factory.mktemp("older"), 3)
    assert loaded is not None
    assert loaded.narrowness == Narrowness.FEW_ROWS
    return loaded


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def four_bits(outputs: int, inputs: int) -> Blocks:
    words = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), generator=torch.Generator().manual_seed(1))
    scales = random(outputs, inputs // 32, seed=2).half()
    return Blocks(words.to(torch.int32), scales, random(outputs, inputs // 32, seed=3).half())


WEIGHTS = {
    "four bits": lambda outputs, inputs: four_bits(outputs, inputs),
    "eight bits": lambda outputs, inputs: rounded(random(outputs, inputs)),
    "bf16": lambda outputs, inputs: random(outputs, inputs).bfloat16(),
    "fp16": lambda outputs, inputs: random(outputs, inputs).half(),
}


def values(weight: torch.Tensor | Blocks) -> torch.Tensor:
    return weight.dense() if isinstance(weight, Blocks) else weight.float()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (31, 64), (70, 96), (128, 1536)])
def test_products_are_those_of_torch(kernels, kind, outputs, inputs):
    weight = WEIGHTS[kind](outputs, inputs)
    packed = kernels.pack(weight)
    for count in (1, 2, 3, 5, 8, 9, 40):
        rows = random(count, inputs, seed=count)
        expected = linear(rows.double(), values(weight).double())
        found = kernels.linear(packed, rows)
        assert found.shape == (count, outputs)
        assert (found - expected).abs().max() < 2e-6 * inputs
        bias, before = random(outputs, seed=9), random(count, outputs, seed=10)
        assert torch.equal(kernels.linear(kernels.pack(weight, bias), rows), found + bias)
        onto = before.clone()
        assert kernels.linear(packed, rows, onto=onto) is onto
        assert torch.equal(onto, before + found)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (31, 64), (70, 96), (128, 1536), (40, 576)])
def test_narrow_products_are_as_close_as_their_rows(kernels, narrowness, kind, outputs, inputs):
    assert_close_as_rows(kernels, narrowness, kind, outputs, inputs)


def assert_close_as_rows(kernels, narrowness: Narrowness, kind: str, outputs: int, inputs: int) -> None:
    weight = WEIGHTS[kind](outputs, inputs)
    packed = kernels.pack(weight, random(outputs, seed=9))
    for count in (1, 2, 3, 4, 5, 11, 12, 16, 17, 33, 70, 600):
        rows, onto = random(count, inputs, seed=count), random(count, outputs, seed=11)
        expected = linear(rows.double(), values(weight).double()) + random(outputs, seed=9) + onto
        found = kernels.linear(packed, rows, onto=onto.clone(), narrowness=narrowness)
        # Both factors are rounded, by one part in 512 at most, and fp32 sums them; bytes by one of a group's largest.
        most = rows.double().abs()
        if narrowness == Narrowness.BYTES and isinstance(weight, Blocks):
            most = most.view(count, -1, 32).amax(dim=2).repeat_interleave(32, dim=1)
        bound = linear(most, values(weight).double().abs()) / 250 + 1e-4
        assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("narrowness", [Narrowness.EXACT, Narrowness.FEW_ROWS, Narrowness.BYTES])
def test_products_on_older_processors_are_as_close_as_their_rows(older_kernels, narrowness, kind):
    assert_close_as_rows(older_kernels, narrowness, kind, 70, 576)


@pytest.mark.parametrize("kind", ["four bits", "eight bits"])
def test_a_few_narrow_rows_on_older_processors_are_closer_than_bf16(older_kernels, kind):
    assert_closer_than_bf16(older_kernels, kind)


@pytest.mark.parametrize("kind", ["four bits", "eight bits"])
def test_a_few_narrow_rows_are_closer_than_bf16(kernels, kind):
    if not kernels.narrowness:
        pytest.skip("this processor has no narrow products")
    assert_closer_than_bf16(kernels, kind)


def assert_closer_than_bf16(kernels, kind: str) -> None:
    weight, rows = WEIGHTS[kind](64, 576), random(4, 576)
    expected = linear(rows.double(), values(weight).double())
    narrow = kernels.linear(kernels.pack(weight), rows, narrowness=kernels.narrowness)
    rounded_rows = linear(rows.bfloat16().double(), values(weight).double())
    assert (narrow - expected).norm() * 8 < (rounded_rows - expected).norm()


@pytest.mark.parametrize(("bits", "digit"), [(4, 15), (8, 127), (8, -128)])
def test_the_largest_sums_fit(kernels, narrowness, bits, digit):
    assert_largest_sums_fit(kernels, narrowness, bits, digit)


@pytest.mark.parametrize(("bits", "digit"), [(4, 15), (8, 127), (8, -128)])
@pytest.mark.parametrize("narrowness", [Narrowness.FEW_ROWS, Narrowness.BYTES])
def test_the_largest_sums_fit_on_older_processors(older_kernels, narrowness, bits, digit):
    assert_largest_sums_fit(older_kernels, narrowness, bits, digit)


def assert_largest_sums_fit(kernels, narrowness: Narrowness, bits: int, digit: int) -> None:
    """Of what a word's sums can come to, where all digits and inputs are as large as there are."""
    word = int.from_bytes([digit * 17 if bits == 4 else digit % 256] * 4, "little", signed=True)
    scales = torch.full((40, 3), 0.5).half()
    offsets = torch.zeros_like(scales) if bits == 4 else None
    packed = kernels.pack(Blocks(torch.full((40, 96 * bits // 32), word, dtype=torch.int32), scales, offsets))
    rows = torch.ones(13, 96) * torch.tensor([1.0, -1.0]).repeat(7)[:13, None]
    found = kernels.linear(packed, rows, narrowness=narrowness)
    assert torch.allclose(found, (rows.sum(1) * digit * 0.5)[:, None].expand(-1, 40), rtol=1e-5)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_narrow_rows_do_not_reach_each_other(kernels, narrowness, kind):
    packed = kernels.pack(WEIGHTS[kind](70, 96))
    for count in (5, 40):
        rows = random(count, 96)
        alone = kernels.linear(packed, rows, narrowness=narrowness)
        rows[1, 3], rows[2, 40], rows[4] = float("nan"), float("inf"), 0.0
        found = kernels.linear(packed, rows, narrowness=narrowness)
        assert not found[1:3].isfinite().any()
        assert (found[4] == 0).all()
        assert torch.equal(found[[0, 3, *range(5, count)]], alone[[0, 3, *range(5, count)]])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_row_comes_out_the_same_in_any_company(kernels, folder, kind):
    packed = kernels.pack(WEIGHTS[kind](96, 256))
    rows = random(37, 256)
    together = kernels.linear(packed, rows)
    alone = torch.cat([kernels.linear(packed, row.unsqueeze(0)) for row in rows])
    assert torch.equal(together, alone)
    assert torch.equal(together, load_kernels(folder, 2).linear(packed, rows))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("count", [5, 70, 300, 600])
def test_narrow_rows_come_out_the_same_on_any_number_of_threads(kernels, narrowness, folder, kind, count):
    packed = kernels.pack(WEIGHTS[kind](70, 576))
    rows = random(count, 576)
    found = kernels.linear(packed, rows, narrowness=narrowness)
    assert torch.equal(found, load_kernels(folder, 2).linear(packed, rows, narrowness=narrowness))


@pytest.mark.parametrize("kind", ["four bits", "eight bits"])
def test_a_row_of_bytes_comes_out_the_same_in_any_company(kernels, kind):
    packed = kernels.pack(WEIGHTS[kind](96, 256))
    rows = random(37, 256)
    together = kernels.linear(packed, rows, narrowness=Narrowness.BYTES)
    alone = torch.cat([kernels.linear(packed, row.unsqueeze(0), narrowness=Narrowness.BYTES) for row in rows])
    assert torch.equal(together, alone)


def test_rows_may_lie_apart(kernels):
    packed = kernels.pack(rounded(random(40, 64)))
    wide = random(5, 200)
    assert torch.equal(kernels.linear(packed, wide[:, 7:71]), kernels.linear(packed, wide[:, 7:71].contiguous()))


@pytest.mark.parametrize("outputs", [40, 1024])
def test_results_may_lie_in_kept_memory(kernels, outputs):
    packed = kernels.pack(rounded(random(outputs, 64)))
    for count in (3, 40):
        rows = random(count, 64)
        for narrowness in {Narrowness.EXACT, kernels.narrowness, Narrowness.BYTES}:
            expected = kernels.linear(packed, rows, narrowness=narrowness)
            kept = kernels.linear(packed, rows, room="some", narrowness=narrowness)
            assert torch.equal(kept, expected)
            assert kernels.linear(packed, rows, room="some", narrowness=narrowness).data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("inputs", [8, 33])
def test_sixteen_bits_need_no_whole_vectors(kernels, inputs):
    weight = random(6, inputs).bfloat16()
    found = kernels.linear(kernels.pack(weight), random(3, inputs))
    assert torch.allclose(found, linear(random(3, inputs), weight.float()), atol=1e-5)


def test_fp32_weights_are_left_to_torch(kernels):
    assert kernels.pack(random(4, 32)) is None


def unchanged(kernels, rows: torch.Tensor, before: Norm | SwiGlu, size: int) -> torch.Tensor:
    """What is done before a product, as a product with ones on the diagonal shows it."""
    return kernels.linear(kernels.pack(torch.eye(size).bfloat16()), rows, before=before)


@pytest.mark.parametrize("size", [5, 16, 576])
def test_the_norm_is_that_of_torch(kernels, size):
    norm = Norm(random(size, seed=1), 1e-5)
    rows = random(40, size) * 3
    assert torch.allclose(unchanged(kernels, rows, norm, size), norm(rows), rtol=1e-5, atol=1e-6)
    apart = random(4, 2 * size)[:, size:]
    assert torch.equal(unchanged(kernels, apart, norm, size), unchanged(kernels, apart.clone(), norm, size))


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_swiglu_is_that_of_torch(kernels, size):
    gate_up = random(33, 2 * size) * 20
    gate_up[0, :5] = torch.tensor([-1e4, 1e4, 0.0, -88.5, 88.5])
    gate, up = gate_up.double().chunk(2, dim=1)
    found = unchanged(kernels, gate_up, SwiGlu(), size).double()
    assert torch.allclose(found, silu(gate) * up, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("before", [Norm(random(96), 1e-5), SwiGlu()], ids=["norm", "SwiGLU"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_is_done_before_a_product_is_done_before_any(kernels, kind, before):
    packed = kernels.pack(WEIGHTS[kind](70, 96))
    for count in (1, 5, 40):
        rows = random(count, 192 if isinstance(before, SwiGlu) else 96)
        done = before(rows.clone())
        for narrowness in {Narrowness.EXACT, kernels.narrowness, Narrowness.BYTES}:
            found = kernels.linear(packed, rows, before=before, narrowness=narrowness)
            expected = kernels.linear(packed, done, narrowness=narrowness)
            # What lies between two bytes may become either.
            assert (found - expected).norm() < (1e-2 if narrowness == Narrowness.BYTES else 3e-3) * expected.norm()


def test_what_is_not_finite_stays_so(kernels):
    rows = random(2, 64)
    rows[1, 3] = float("nan")
    found = unchanged(kernels, rows, SwiGlu(), 32)
    assert found[0].isfinite().all()
    assert found[1].isnan().any()
    assert unchanged(kernels, rows, Norm(torch.ones(64), 1e-5), 64)[1].isnan().all()


def plain_layout(kv_heads: int, size: int, dtype: torch.dtype) -> CacheLayout:
    return CacheLayout(dtype, 16, kv_heads, size, size, is_latent=False, scale=size**-0.5)


def latent_layout(key_size: int, dtype: torch.dtype) -> CacheLayout:
    return CacheLayout(dtype, 16, 1, key_size, 32, is_latent=True, scale=key_size**-0.5)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_turned_and_kept(kernels, has_norms, dtype):
    heads, kv_heads, size, count = 6, 2, 16, 50
    qkv = random(count, (heads + 2 * kv_heads) * size)
    angles = torch.outer(torch.arange(64).float(), 1.0 / 100 ** (torch.arange(size // 2) / 8))
    tables = (angles.cos(), angles.sin())
    positions = torch.arange(count) % 64
    norms = random(heads + kv_heads, size, seed=4) if has_norms else None
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:count]
    cache = torch.zeros(80, 2 * kv_heads * size, dtype=dtype)
    layout, wide = plain_layout(kv_heads, size, dtype), torch.full((count, qkv.shape[1] + 3), 7.0)
    wide[:, : qkv.shape[1]] = qkv
    step = StepTensors([], positions, positions, slots, [], positions, [])

    by_head = qkv.view(count, -1, size)
    turning, plain = by_head.split((heads + kv_heads, kv_heads), dim=1)
    if norms is not None:
        turning = rms_norm(turning, (size,), eps=1e-5) * norms
    first, second = turning.chunk(2, dim=2)
    cosines, sines = (table[positions].unsqueeze(1) for table in tables)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=2)

    kernels.rotate_and_write(wide[:, : qkv.shape[1]], heads, tables, step, norms, 1e-5, cache, layout)
    assert torch.allclose(wide[:, :-3].reshape(count, -1, size)[:, : heads + kv_heads], turned, atol=1e-5)
    assert (wide[:, -3:] == 7.0).all()
    kept = torch.cat((turned[:, heads:], plain), dim=1).flatten(1)
    assert torch.allclose(cache[slots].float(), kept.to(dtype).float(), atol=1e-5 if dtype == torch.float32 else 0.02)
    untouched = torch.ones(80, dtype=torch.bool).index_fill_(0, slots, False)
    assert not cache[untouched].any()


def attend(kernels, queries, cache, layout: CacheLayout, group: AttentionGroup) -> torch.Tensor:
    out = torch.full((*queries.shape[:2], layout.value_size), float("nan"))
    kernels.attend(queries, cache, layout, group, FULL, out)
    return out


def decodes(blocks: torch.Tensor, lengths: list[int]) -> AttentionGroup:
    return AttentionGroup(0, len(lengths), 1, blocks, max(lengths), lengths=torch.tensor(lengths))


def chunk(blocks: torch.Tensor, start: int, count: int) -> AttentionGroup:
    return AttentionGroup(0, 1, count, blocks, start + count)


SHARING = {"one each": (4, 4), "three": (6, 2), "five": (5, 1), "all": (9, 1)}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_latent", [False, True])
def test_attention_is_that_of_torch(kernels, sharing, dtype, is_latent):
    heads, kv_heads = SHARING[sharing]
    layout = latent_layout(48, dtype) if is_latent else plain_layout(kv_heads, 80, dtype)
    kv_heads, key_size, value_size = layout.kv_head_count, layout.key_size, layout.value_size
    values_at, token_size = layout.values_at, layout.token_size
    lengths = [1, 16, 17, 255, 256, 257, 700]
    blocks_each = -(-max(lengths) // 16)
    generator = torch.Generator().manual_seed(5)
    cache = random(len(lengths) * blocks_each, 16 * token_size).to(dtype)
    blocks = torch.randperm(len(cache), generator=generator).view(len(lengths), blocks_each)
    wide = random(len(lengths), heads * key_size + 5, seed=6) * 2
    queries = wide[:, : heads * key_size].unflatten(1, (heads, key_size))

    found = attend(kernels, queries, cache, layout, decodes(blocks, lengths))
    for row, length in enumerate(lengths):
        tokens = cache[blocks[row]].view(-1, token_size)[:length].float()
        keys = tokens[:, : kv_heads * key_size].view(length, kv_heads, key_size).repeat_interleave(heads // kv_heads, 1)
        of_values = tokens[:, values_at : values_at + kv_heads * value_size].view(length, kv_heads, value_size)
        of_values = of_values.repeat_interleave(heads // kv_heads, 1)
        weights = (torch.einsum("hd,thd->ht", queries[row], keys) * layout.scale).softmax(dim=1)
        expected = torch.einsum("ht,thd->hd", weights, of_values)
        assert torch.allclose(found[row], expected, atol=2e-6, rtol=1e-5), length

    alone = attend(kernels, queries[4:5], cache, layout, decodes(blocks[4:5], lengths[4:5]))
    assert torch.equal(alone[0], found[4])


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("fits_unit", [False, True])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 70), (3, 130), (120, 20), (500, 65)])
def test_a_prompts_attention_is_that_of_torch_however_it_is_cut(
    kernels, sharing, dtype, is_latent, fits_unit, start, count
):
    heads, kv_heads = SHARING[sharing]
    if is_latent:
        layout = latent_layout(96 if fits_unit else 48, dtype)
    else:
        layout = plain_layout(kv_heads, 64 if fits_unit else 80, dtype)
    kv_heads, key_size, value_size = layout.kv_head_count, layout.key_size, layout.value_size
    values_at, token_size = layout.values_at, layout.token_size
    length = start + count
    cache = random(50, 16 * token_size).to(dtype)
    blocks = torch.randperm(50, generator=torch.Generator().manual_seed(5))[: -(-length // 16)].contiguous()
    wide = random(count, heads * key_size + 5, seed=6) * 2
    queries = wide[:, : heads * key_size].unflatten(1, (heads, key_size))

    found = attend(kernels, queries, cache, layout, chunk(blocks, start, count))
    tokens = cache[blocks].view(-1, token_size)[:length].float()
    keys = tokens[:, : kv_heads * key_size].view(length, kv_heads, key_size).repeat_interleave(heads // kv_heads, 1)
    of_values = tokens[:, values_at : values_at + kv_heads * value_size].view(length, kv_heads, value_size)
    scores = torch.einsum("rhd,thd->hrt", queries, keys) * key_size**-0.5
    hidden = torch.arange(length) > torch.arange(start, length).unsqueeze(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=2)
    expected = torch.einsum("hrt,thd->rhd", weights, of_values.repeat_interleave(heads // kv_heads, 1))
    # Products of bf16 take queries and weights in it.
    is_narrow = fits_unit and dtype == torch.bfloat16 and compute_dtype("bf16", cache.device) == torch.bfloat16
    assert torch.allclose(found, expected, atol=0.04 if is_narrow else 3e-6, rtol=1e-5)
    assert (found - expected).norm() < (5e-3 if is_narrow else 1e-5) * expected.norm()

    cut = count // 3
    parts = [
        attend(kernels, queries[first:last], cache, layout, chunk(blocks, start + first, last - first))
        for first, last in ((0, cut), (cut, count))
    ]
    assert torch.equal(torch.cat(parts), found)


def test_attention_reads_nothing_behind_a_sequences_end_and_keeps_nans_to_their_row(kernels):
    cache = random(4, 16 * 2 * 16)
    cache.view(-1, 32)[5:16] = float("nan")
    queries, blocks = random(2, 1, 16), torch.tensor([[0, 9_999], [1, 2]])
    layout = plain_layout(1, 16, torch.float32)
    found = attend(kernels, queries, cache, layout, decodes(blocks, [5, 32]))
    assert found.isfinite().all()
    found = attend(kernels, queries, cache, layout, decodes(blocks, [6, 32]))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_large_scores_do_not_overflow(kernels):
    cache = torch.zeros(1, 16 * 2 * 16)
    tokens = cache.view(16, 32)
    tokens[:, 16:] = torch.arange(16.0).unsqueeze(1)
    tokens[3, :16] = 1e4
    layout, blocks = plain_layout(1, 16, torch.float32), torch.tensor([[0]])
    found = attend(kernels, torch.ones(1, 1, 16) * 4, cache, layout, decodes(blocks, [16]))
    assert torch.equal(found, torch.full((1, 1, 16), 3.0))


def test_what_the_kernels_cannot_attend_to_is_known(kernels):
    assert kernels.can_attend(plain_layout(1, 64, torch.float32))
    assert not kernels.can_attend(plain_layout(1, 20, torch.float32))
    assert not kernels.can_attend(plain_layout(1, 64, torch.float16))
    assert kernels.can_attend_chunks(plain_layout(1, 48, torch.float32))
    assert kernels.can_attend_chunks(plain_layout(1, 64, torch.bfloat16)) == kernels.are_quickest_in_bf16
    fits = kernels.are_quickest_in_bf16 and kernels.narrowness != Narrowness.ANY_ROWS
    assert kernels.can_attend_chunks(plain_layout(1, 48, torch.bfloat16)) == fits


@pytest.mark.parametrize(
    ("narrowness", "has_unit", "expected"),
    [
        (Narrowness.EXACT, False, False),
        (Narrowness.FEW_ROWS, False, True),
        (Narrowness.FEW_ROWS, True, False),
        (Narrowness.ANY_ROWS, True, True),
    ],
)
def test_what_torch_multiplies_quicker_in_bf16_is_left_to_it(kernels, monkeypatch, narrowness, has_unit, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_unit)
    monkeypatch.setattr(kernels._library, "tidegate_narrowness", lambda: narrowness.value)
    kernels = cpu_kernels.CpuKernels(kernels._library, 1)
    assert kernels.are_quickest_in_bf16 is expected
    assert kernels.can_attend_chunks(plain_layout(1, 64, torch.bfloat16)) is expected
    compute = Compute(torch.device("cpu"), torch.bfloat16, torch.float32, torch.bfloat16, kernels, narrowness)
    assert (Projection(four_bits(64, 64), compute).packed is not None) is expected


def test_the_library_is_built_once(folder, monkeypatch):
    assert load_kernels(folder, 1) is not None
    (built,) = folder.iterdir()
    assert built.name.startswith("cpu-kernels-")
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert load_kernels(folder, 1) is not None


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_there_are_no_kernels_and_a_warning(tmp_path, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path, 1) is None
    assert "no CPU kernels" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_can_write_to_is_not_trusted(folder, tmp_path, monkeypatch, caplog):
    assert load_kernels(folder, 1) is not None
    monkeypatch.setattr(cpu_kernels.tempfile, "gettempdir", lambda: str(tmp_path))
    private = tmp_path / f"tidegate-kernels-{os.getuid()}"
    shutil.copytree(folder, private)
    private.chmod(0o777)
    assert load_kernels(None, 1) is None
    assert "can be written by others" in caplog.text
    private.chmod(0o700)
    assert load_kernels(None, 1) is not None


def test_exponentials_are_exact_to_the_last_places(kernels):
    """By way of SwiGLU, whose gate holds one: for an up of 1 and a gate of x it is x / (1 + exp(-x))."""
    x = torch.linspace(-80, 80, 3968).view(-1, 64)
    found = unchanged(kernels, torch.cat((x, torch.ones_like(x)), dim=1), SwiGlu(), 64).flatten()
    expected = torch.tensor([value / (1 + math.exp(-value)) for value in x.flatten().tolist()])
    assert ((found - expected).abs() <= 4e-7 * expected.abs() + 1e-37).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="by the flags of x86")
def test_products_of_many_rows_are_in_bf16_only_where_the_processor_has_them():
    has_them = bool(re.search(r" (avx512_bf16|amx_tile)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    assert compute_dtype("bf16", torch.device("cpu")) == (torch.bfloat16 if has_them else torch.float32)
    assert compute_dtype("fp16", torch.device("cpu")) == torch.float32
