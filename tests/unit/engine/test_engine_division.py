"""Ranks' ranges are the whole model, each part once, but for KV heads that ranks share."""

from pathlib import Path

import pytest

from llm_engine.architecture import from_hugging_face
from llm_engine.division import division
from llm_engine.errors import ModelLoadError
from llm_engine.layouts import fused_tensors

PATH = Path("config.json")


def architecture_of(heads, kv_heads):
    fields = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 50, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": 1, "vocab_size": 101, "head_dim": 8,
    }  # fmt: skip
    return from_hugging_face(PATH, fields, {})


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 2), (9, 3, 3), (8, 2, 4), (8, 2, 3), (6, 1, 4), (32, 8, 8), (32, 8, 16)]
)
def test_ranks_are_the_whole_model(heads, kv_heads, size):
    architecture = architecture_of(heads, kv_heads)
    ranks = [division(PATH, architecture, rank, size) for rank in range(size)]
    assert [head for here in ranks for head in here.query_heads] == list(range(heads))
    assert {head for here in ranks for head in here.kv_heads} == set(range(kv_heads))
    for here in ranks:
        assert {head // architecture.group_size for head in here.query_heads} == set(here.kv_heads)
        local = here.local(architecture)
        assert local.head_count == local.group_size * local.kv_head_count
    for fused in fused_tensors(architecture, tied=False):
        for part in fused.parts:
            if part.cut is not None and part.cut.by != "kv heads":
                places = [place for here in ranks for place in here.span(part)]
                assert places == list(range(part.shape[part.cut.axis])), part.name
            if part.cut is not None:
                sizes = [here.shape(part)[part.cut.axis] for here in ranks]
                assert [len(here.span(part)) for here in ranks] == sizes


def test_heads_are_as_even_as_they_come():
    counts = [len(division(PATH, architecture_of(32, 8), rank, 3).query_heads) for rank in range(3)]
    assert counts == [8, 12, 12]


def test_more_ranks_than_can_share_a_kv_head_are_refused():
    with pytest.raises(ModelLoadError, match="tensor_parallel_size is 5, and 2 KV heads with 2 query heads each"):
        division(PATH, architecture_of(4, 2), 0, 5)
