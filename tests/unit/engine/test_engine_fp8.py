"""Weights of eight-bit floats: what is read is what was written, less their rounding."""

import pytest
import torch

from llm_engine.errors import ModelLoadError
from llm_engine.weights import load_checkpoint

BLOCK = (10, 12)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def stored(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in eight bits, its scales, and the values that both say."""
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, BLOCK, strict=True))
    scales = torch.empty(rows, columns)
    numbers, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            part = (slice(row * BLOCK[0], (row + 1) * BLOCK[0]), slice(column * BLOCK[1], (column + 1) * BLOCK[1]))
            scales[row, column] = weight[part].abs().max() / 448
            numbers[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
            values[part] = numbers[part].float() * scales[row, column]
    return numbers, scales, values


@pytest.fixture
def folders(make_folder, tiny_tensors, tmp_path):
    """The tiny model in eight bits, but for embeddings, head and norms; and what these weights are in fp32."""
    narrow, wide = {}, {}
    for name, tensor in tiny_tensors.items():
        if "_proj" in name:
            narrow[name], narrow[f"{name}_scale_inv"], wide[name] = stored(tensor)
    first = make_folder({"quantization_config": FP8}, narrow).rename(tmp_path / "fp8")
    return first, make_folder(tensors=wide)


@pytest.mark.parametrize("size", [1, 2])
def test_values_are_numbers_times_the_scale_of_their_block_on_every_rank(folders, size):
    for rank in range(size):
        narrow, wide = (load_checkpoint(f, dtype="fp32", cache_dir=None, rank=rank, size=size) for f in folders)
        assert narrow.tensors.keys() == wide.tensors.keys()
        for name, tensor in narrow.tensors.items():
            assert torch.equal(tensor, wide.tensors[name]), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_block_size": None}, ["weight_block_size", "missing"]),
        ({"weight_block_size": [128]}, ["weight_block_size", "[128]"]),
        ({"weight_block_size": [0, 128]}, ["weight_block_size", "[0, 128]"]),
        ({"fmt": "e5m2"}, ["fmt", "e5m2"]),
        ({"activation_scheme": "static"}, ["activation_scheme", "static"]),
        ({"modules_to_not_convert": ["lm_head"]}, ["modules_to_not_convert"]),
        ({"weight_block_size": [16, 12]}, ["_scale_inv", "expected [", "16 x 12"]),
    ],
)
def test_another_kind_of_weights_is_refused_by_name(make_folder, tiny_tensors, changes, words):
    name = "model.layers.0.self_attn.q_proj.weight"
    numbers, scales, _ = stored(tiny_tensors[name])
    fields = {key: value for key, value in {**FP8, **changes}.items() if value is not None}
    folder = make_folder({"quantization_config": fields}, {name: numbers, f"{name}_scale_inv": scales})
    with pytest.raises(ModelLoadError) as caught:
        load_checkpoint(folder, dtype="fp32", cache_dir=None)
    assert [word for word in words if word not in str(caught.value)] == []


def test_scales_of_no_weight_and_scales_that_config_does_not_announce_are_refused(make_folder, tiny_tensors):
    scales = {"model.layers.7.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(ModelLoadError, match=r"no matrix model\.layers\.7\.mlp\.up_proj\.weight"):
        load_checkpoint(make_folder({"quantization_config": FP8}, scales), dtype="fp32", cache_dir=None)
    with pytest.raises(ModelLoadError, match=r"weight_scale_inv is not supported"):
        load_checkpoint(make_folder({}, scales), dtype="fp32", cache_dir=None)


def test_a_weight_in_eight_bits_without_its_scale_is_refused(make_folder, tiny_tensors):
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = make_folder({"quantization_config": FP8}, {name: stored(tiny_tensors[name])[0]})
    with pytest.raises(ModelLoadError, match=rf"{name} has type F8_E4M3, expected F64 or F32 or F16 or BF16"):
        load_checkpoint(folder, dtype="fp32", cache_dir=None)
