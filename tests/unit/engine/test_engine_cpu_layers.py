"""All layers in one call of the kernels give what their products and attention give one by one."""

import pytest
import torch

from llm_engine import EngineConfig, model
from llm_engine import rank as rank_module
from llm_engine.cpu_kernels import Narrowness
from llm_engine.rank import LoadedRank
from llm_engine.ranks import Alone
from llm_engine.step_tensors import RowWork

FAMILIES = {
    "plain": ({}, ()),
    "biases": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    ),
    "head norms": ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, ("q_norm.weight", "k_norm.weight")),
}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}


def tensors(head_dim: int, more: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Those of a small model of SIZES, but for the size of its heads."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).bfloat16()

    heads = {
        "q_proj": 4 * head_dim,
        "k_proj": 2 * head_dim,
        "v_proj": 2 * head_dim,
        "q_norm": head_dim,
        "k_norm": head_dim,
    }
    tensors = {"model.embed_tokens.weight": random(96, 64), "lm_head.weight": random(96, 64)}
    tensors["model.norm.weight"] = random(64) + 1
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = random(heads[name], 64)
        for name in more:
            tensors[f"{prefix}.self_attn.{name}"] = random(heads[name.split(".")[0]])
        tensors[f"{prefix}.self_attn.o_proj.weight"] = random(64, heads["q_proj"])
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = random(64) + 1
        for name, shape in {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}.items():
            tensors[f"{prefix}.mlp.{name}.weight"] = random(*shape)
    return tensors


@pytest.fixture(params=FAMILIES)
def folder(request, make_folder):
    """A small model, whose heads are as wide as the matrix unit takes them."""
    fields, more = FAMILIES[request.param]
    return make_folder({**SIZES, **fields}, tensors(SIZES["head_dim"], more))


def works(*spans: tuple[int, int]) -> list[RowWork]:
    """Of each sequence so many tokens from one on; each has four blocks of 16 tokens."""
    return [
        RowWork(
            start=start,
            token_ids=[(7 * place + 3 * token) % 96 for token in range(start, start + count)],
            block_ids=[4 * place + block for block in range(4)],
            sample_count=1,
        )
        for place, (start, count) in enumerate(spans)
    ]


STEPS = (works((0, 21), (0, 1), (0, 40)), works((21, 1), (1, 9), (40, 1)), works((22, 1), (10, 1), (41, 1)))


@pytest.mark.parametrize("dtype", ["int8", "w8a8", "bf16", "fp16"])
@pytest.mark.parametrize("window", [0, 8], ids=["all", "window"])
def test_layers_in_one_call_are_those_called_one_by_one(folder, dtype, window, monkeypatch):
    config = EngineConfig(
        model_path=str(folder), dtype=dtype, thread_count=2, kv_cache_bytes=1 << 22, block_token_count=16,
        attention_window=window, attention_window_from=16, attention_sinks=2,
    )  # fmt: skip

    if LoadedRank(config, 0).compute.narrowness == Narrowness.FEW_ROWS:
        # There many rows are another library's, and no layer the kernels' alone; as on a processor without bf16.
        monkeypatch.setattr(rank_module, "compute_dtype", lambda dtype, device: torch.float32)

    def logits(few_rows: int | None) -> list[torch.Tensor]:
        rank = LoadedRank(config, 0).ready(Alone())
        assert rank.model._cpu_layers is not None
        if few_rows is None:
            rank.model._cpu_layers = None
        else:
            monkeypatch.setattr(model, "_FEW_ROWS", few_rows)
        return [rank.forward(rank.lay_out(step)) for step in STEPS]

    one_by_one = logits(None)
    assert all(step.isfinite().all() and step.std() > 0.01 for step in one_by_one)
    for few_rows in (0, 1000):
        for found, expected in zip(logits(few_rows), one_by_one, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "settings", "is_narrow"),
    [
        ("bf16", {}, True),
        ("w8a8", {}, True),
        ("bf16", {"tensor_parallel_size": 2}, True),
        ("bf16", {"tensor_parallel_size": 2, "node_count": 2, "master_port": 1}, False),
        ("fp32", {}, False),
        ("int8", {}, False),
    ],
)
def test_what_narrow_products_are_given_is_cached_in_bf16(folder, dtype, settings, is_narrow):
    """Whatever torch computes in; hosts, of which one may have no compiler, count the same blocks."""
    config = EngineConfig(model_path=str(folder), dtype=dtype, kv_cache_bytes=1 << 20, **settings)
    loaded = LoadedRank(config, 0)
    narrow = is_narrow and loaded.compute.narrowness != Narrowness.EXACT
    expected = torch.bfloat16 if narrow else loaded.dtype
    assert loaded.compute.cached == expected
    # Layers, keys and values, tokens of a block, KV heads of a rank, their size; one is for padding.
    block = 2 * 2 * 16 * (2 // config.tensor_parallel_size) * 32 * expected.itemsize
    assert loaded.block_count == (1 << 20) // block - 1


def test_what_the_kernels_cannot_read_is_cached_in_torchs_type(make_folder):
    folder = make_folder({**SIZES, "head_dim": 20}, tensors(head_dim=20))
    loaded = LoadedRank(EngineConfig(model_path=str(folder), dtype="bf16"), 0)
    assert loaded.compute.cached == loaded.dtype
    rank = loaded.ready(Alone())
    assert rank.forward(rank.lay_out(STEPS[0])).isfinite().all()
