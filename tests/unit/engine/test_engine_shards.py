"""Each rank reads its own part of a model's files, and no more."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llm_engine import gguf_reader, weights
from llm_engine.gguf_reader import GgufFile
from llm_engine.weights import load_checkpoint

HIDDEN = 32
NORM_BYTES = 5 * HIDDEN * 4
"""Of the tiny model: what every rank reads whole."""


def random_matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def load(path, rank=0, size=1):
    return load_checkpoint(path, dtype="fp32", cache_dir=None, rank=rank, size=size).tensors


class SpiedSlice:
    """A tensor of a safetensors file that tells how much of it is taken."""

    def __init__(self, stored, reads):
        self._stored, self._reads = stored, reads
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, slices):
        part = self._stored[slices]
        self._reads.append(part.nbytes)
        return part


@pytest.fixture
def reads(monkeypatch):
    """How many bytes of a file each tensor's reading takes, in turn."""
    reads = []

    class SpiedFile:
        def __init__(self, path, framework):
            self._file = safe_open(path, framework=framework)
            self.keys = self._file.keys

        def get_slice(self, name):
            return SpiedSlice(self._file.get_slice(name), reads)

    def spied(convert):
        return lambda raw, *kind: reads.append(raw.nbytes) or convert(raw, *kind)

    monkeypatch.setattr(weights, "safe_open", SpiedFile)
    monkeypatch.setattr(gguf_reader, "dequantize", spied(gguf_reader.dequantize))
    for kind, convert in weights.GGUF_BLOCKS.items():
        monkeypatch.setitem(weights.GGUF_BLOCKS, kind, spied(convert))
    return reads


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_two_ranks_read_together_what_one_reads_alone_but_for_norms(make_folder, make_gguf, reads, form):
    rows_in_blocks = {
        "blk.0.attn_q.weight": (random_matrix(32, HIDDEN), "Q4_1"),
        "blk.1.ffn_up.weight": (random_matrix(48, HIDDEN), "Q8_0"),
        "blk.1.ffn_gate.weight": (random_matrix(48, HIDDEN), "Q8_0"),
    }
    path = make_folder() if form == "folder" else make_gguf(tensors=rows_in_blocks)
    totals = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        reads.clear()
        load(path, rank, size)
        totals.append(sum(reads))
    assert totals[0] > 20 * NORM_BYTES
    assert totals[1] == totals[2] == (totals[0] + NORM_BYTES) / 2


def test_ranks_have_the_whole_also_where_blocks_are_torn(make_gguf):
    # A block is 32 columns, and the cut is in its middle.
    path = make_gguf(tensors={"blk.0.attn_output.weight": (random_matrix(32, HIDDEN), "Q8_0")})
    whole = load(path)["layers.0.attention_output"].dense()
    parts = [load(path, rank, 2)["layers.0.attention_output"] for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
def test_a_part_of_a_tensor_is_that_part_of_its_values(make_gguf, reads, kind):
    file = GgufFile(make_gguf(tensors={"matrix": (random_matrix(8, 128), kind)}))
    whole = file.tensor("matrix")
    reads.clear()
    for slices in ((slice(2, 5),), (slice(None), slice(32, 96)), (slice(3, None), slice(40, 60))):
        assert np.array_equal(file.tensor("matrix", slices), whole[slices])
    assert all(8 * read <= 4 * file.tensors["matrix"].byte_count for read in reads)
    vector = GgufFile(make_gguf(tensors={"vector": random_matrix(8)}))
    assert np.array_equal(vector.tensor("vector", (slice(2, 5),)), random_matrix(8)[2:5])


def test_blocks_are_taken_as_they_lie_or_not_at_all(make_gguf):
    file = GgufFile(make_gguf(tensors={"matrix": (random_matrix(8, 128), "Q8_0")}))
    whole = file.raw_rows("matrix")
    assert np.array_equal(file.raw_rows("matrix", (slice(2, 5),)), whole[2:5])
    assert np.array_equal(file.raw_rows("matrix", (slice(None), slice(32, 96))), whole[:, 34:102])
    assert file.raw_rows("matrix", (slice(None), slice(16, 96))) is None
