"""The GPU's kernel against torch, on a CPU by Triton's interpreter; `pip install triton` where it is not there."""

import os

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton's compiler comes with torch's builds for CUDA")

from llm_engine.gpu_attention import GpuAttention

HEADS = {"one each": (4, 4), "three": (6, 2), "nine": (9, 1), "forty": (40, 1)}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected_row(query: torch.Tensor, tokens: torch.Tensor, kv_heads: int, value_size: int, at: int) -> torch.Tensor:
    heads, key_size = query.shape
    keys = tokens[:, : kv_heads * key_size].view(len(tokens), kv_heads, key_size)
    values = tokens[:, at : at + kv_heads * value_size].view(len(tokens), kv_heads, value_size)
    keys, values = (each.float().repeat_interleave(heads // kv_heads, 1) for each in (keys, values))
    weights = (torch.einsum("hd,thd->ht", query.float(), keys) * key_size**-0.5).softmax(dim=1)
    return torch.einsum("ht,thd->hd", weights, values)


@pytest.mark.parametrize("sharing", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_latent", [False, True])
def test_rows_attend_as_torch_does(sharing, dtype, is_latent):
    heads, kv_heads = HEADS[sharing]
    if is_latent:
        kv_heads, key_size, value_size, at, token_size = 1, 96, 64, 0, 96
    else:
        key_size = value_size = 80
        at, token_size = kv_heads * key_size, 2 * kv_heads * key_size
    cache = random(100, 16 * token_size).to(dtype)
    terms = {"kv_head_count": kv_heads, "value_size": value_size, "values_at": at, "scale": key_size**-0.5}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3

    lengths = torch.tensor([1, 16, 17, 700])
    generator = torch.Generator().manual_seed(5)
    blocks = torch.stack([torch.randperm(100, generator=generator)[:44] for _ in lengths])
    queries = random(len(lengths), heads * key_size + 5, seed=6)[:, : heads * key_size].to(dtype)
    queries = queries.unflatten(1, (heads, key_size))
    out = torch.full((len(lengths), heads, value_size), float("nan"), dtype=dtype)
    GpuAttention().attend(queries, cache, token_size, 16, blocks, lengths, 700, out=out, **terms)
    for row, length in enumerate(lengths.tolist()):
        tokens = cache[blocks[row]].view(-1, token_size)[:length]
        assert (out[row] - expected_row(queries[row], tokens, kv_heads, value_size, at)).abs().max() < tolerance

    start, count = 100, 37
    queries = random(count, heads, key_size, seed=7).to(dtype)
    out = torch.full((count, heads, value_size), float("nan"), dtype=dtype)
    GpuAttention().attend_chunk(queries, cache, token_size, 16, blocks[0], start, out=out, **terms)
    for row in range(count):
        tokens = cache[blocks[0]].view(-1, token_size)[: start + row + 1]
        assert (out[row] - expected_row(queries[row], tokens, kv_heads, value_size, at)).abs().max() < tolerance


def test_a_row_with_nan_harms_no_other():
    cache = random(4, 16 * 64)
    cache.view(-1, 64)[5:16] = float("nan")
    out, blocks = torch.empty(2, 1, 32), torch.tensor([[0, 9_999], [1, 2]])
    terms = {"kv_head_count": 1, "value_size": 32, "values_at": 32, "scale": 0.25, "out": out}
    GpuAttention().attend(random(2, 1, 32), cache, 64, 16, blocks, torch.tensor([5, 32]), 32, **terms)
    assert out.isfinite().all()
    GpuAttention().attend(random(2, 1, 32), cache, 64, 16, blocks, torch.tensor([6, 32]), 32, **terms)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
