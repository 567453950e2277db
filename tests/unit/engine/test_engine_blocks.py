"""Weights in blocks: what a file says, and nothing less."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from llm_engine.blocks import GGUF_BLOCKS, Blocks, from_q4_1, rounded, unnamed


def raw_blocks(kind: str, outputs: int = 6, inputs: int = 96) -> tuple[np.ndarray, torch.Tensor]:
    """A random matrix in a file's form, and its values as `gguf` reads them."""
    weight = np.random.default_rng(0).normal(size=(outputs, inputs)).astype(np.float32)
    raw = quantize(weight, GGMLQuantizationType[kind])
    return raw, torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_blocks_have_the_values_of_the_file(kind):
    raw, expected = raw_blocks(kind)
    blocks = GGUF_BLOCKS[kind](raw)
    assert blocks.shape == (6, 96)
    # Q4_0 is read there as (digit - 8) * scale, which rounds otherwise than digit * scale - 8 * scale.
    assert (blocks.dense() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_parts_of_blocks_are_parts_of_the_values(kind):
    blocks = GGUF_BLOCKS[kind](raw_blocks(kind)[0])
    whole = blocks.dense()
    assert torch.equal(blocks.rows(slice(2, 5)).dense(), whole[2:5])
    assert torch.equal(blocks.rows(torch.tensor([5, 0, 0])).dense(), whole[[5, 0, 0]])
    assert torch.equal(blocks.joined([blocks.rows(slice(0, 1))]).dense(), torch.cat((whole, whole[:1])))


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_blocks_survive_a_file(kind):
    blocks = GGUF_BLOCKS[kind](raw_blocks(kind)[0])
    tensors = unnamed({**blocks.named("layers.0.down"), "final_norm": torch.ones(3)})
    assert tensors.keys() == {"layers.0.down", "final_norm"}
    found = tensors["layers.0.down"]
    assert isinstance(found, Blocks)
    assert torch.equal(found.dense(), blocks.dense())


def test_rounding_to_eight_bits_errs_by_half_a_step_of_the_group():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[3, :32] = 0
    blocks = rounded(weight)
    assert blocks is not None
    steps = weight.view(5, 2, 32).abs().amax(dim=2) / 127
    errors = (blocks.dense() - weight).abs().view(5, 2, 32).amax(dim=2)
    # Scales are fp16: the largest digit may err by that, too.
    assert (errors <= 0.5 * steps + 127 * steps * 2**-11 + 1e-12).all()
    assert errors.max() > 0
    assert rounded(torch.ones(5, 33)) is None


def test_blocks_that_are_not_finite_are_seen():
    blocks = from_q4_1(raw_blocks("Q4_1")[0])
    assert blocks.is_finite
    blocks.offsets[1, 1] = float("inf")
    assert not blocks.is_finite
