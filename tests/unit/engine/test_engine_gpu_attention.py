"""The GPU's kernel against torch, on a CPU by Triton's interpreter."""

import os

import pytest
import torch

# Read when the kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

from llm_engine.cache_layout import CacheLayout
from llm_engine.gpu_attention import GpuAttention
from llm_engine.step_tensors import AttentionGroup
from llm_engine.window import FULL

HEADS = {"one each": (4, 4), "three": (6, 2), "nine": (9, 1), "forty": (40, 1)}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decodes(blocks: torch.Tensor, lengths: torch.Tensor) -> AttentionGroup:
    return AttentionGroup(0, len(lengths), 1, blocks, int(lengths.max()), lengths=lengths)


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
        layout = CacheLayout(dtype, 16, 1, 96, 64, is_latent=True, scale=96**-0.5)
    else:
        layout = CacheLayout(dtype, 16, kv_heads, 80, 80, is_latent=False, scale=80**-0.5)
    kv_heads, key_size, value_size = layout.kv_head_count, layout.key_size, layout.value_size
    at, token_size = layout.values_at, layout.token_size
    cache = random(100, 16 * token_size).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3

    lengths = torch.tensor([1, 16, 17, 700])
    generator = torch.Generator().manual_seed(5)
    blocks = torch.stack([torch.randperm(100, generator=generator)[:44] for _ in lengths])
    queries = random(len(lengths), heads * key_size + 5, seed=6)[:, : heads * key_size].to(dtype)
    queries = queries.unflatten(1, (heads, key_size))
    out = torch.full((len(lengths), heads, value_size), float("nan"), dtype=dtype)
    GpuAttention().attend(queries, cache, layout, decodes(blocks, lengths), FULL, out)
    for row, length in enumerate(lengths.tolist()):
        tokens = cache[blocks[row]].view(-1, token_size)[:length]
        assert (out[row] - expected_row(queries[row], tokens, kv_heads, value_size, at)).abs().max() < tolerance

    start, count = 100, 37
    queries = random(count, heads, key_size, seed=7).to(dtype)
    out = torch.full((count, heads, value_size), float("nan"), dtype=dtype)
    GpuAttention().attend(queries, cache, layout, AttentionGroup(0, 1, count, blocks[0], start + count), FULL, out)
    for row in range(count):
        tokens = cache[blocks[0]].view(-1, token_size)[: start + row + 1]
        assert (out[row] - expected_row(queries[row], tokens, kv_heads, value_size, at)).abs().max() < tolerance


def test_a_row_with_nan_harms_no_other():
    cache = random(4, 16 * 64)
    cache.view(-1, 64)[5:16] = float("nan")
    out, blocks = torch.empty(2, 1, 32), torch.tensor([[0, 9_999], [1, 2]])
    layout = CacheLayout(torch.float32, 16, 1, 32, 32, is_latent=False, scale=0.25)
    GpuAttention().attend(random(2, 1, 32), cache, layout, decodes(blocks, torch.tensor([5, 32])), FULL, out)
    assert out.isfinite().all()
    GpuAttention().attend(random(2, 1, 32), cache, layout, decodes(blocks, torch.tensor([6, 32])), FULL, out)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
