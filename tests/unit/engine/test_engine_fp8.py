"""Weights of eight-bit floats: what is read is what was written, less their rounding."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_engine.blocks import Floats8
from llm_engine.errors import ModelLoadError
from llm_engine.weights import load_checkpoint

BLOCK, KEPT_BLOCK = (10, 12), (10, 16)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def stored(weight: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in eight bits, its scales, and the values that both say."""
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    numbers, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            part = tuple(slice(at * size, (at + 1) * size) for at, size in zip((row, column), block, strict=True))
            scales[row, column] = weight[part].abs().max() / 448
            numbers[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
            values[part] = numbers[part].float() * scales[row, column]
    return numbers, scales, values


@pytest.fixture
def make_folders(make_folder, tiny_tensors, tmp_path):
    """The tiny model in eight bits, but for embeddings, head and norms; and what these weights are in fp32."""

    def make(block):
        narrow, wide = {}, {}
        for name, tensor in tiny_tensors.items():
            if "_proj" in name:
                narrow[name], narrow[f"{name}_scale_inv"], wide[name] = stored(tensor, block)
        fields = {"quantization_config": {**FP8, "weight_block_size": list(block)}}
        return make_folder(fields, narrow).rename(tmp_path / "fp8"), make_folder(tensors=wide)

    return make


@pytest.mark.parametrize("size", [1, 2])
def test_values_are_numbers_times_the_scale_of_their_block_on_every_rank(make_folders, size):
    folders = make_folders(BLOCK)
    for rank in range(size):
        narrow, wide = (load_checkpoint(f, dtype="fp32", cache_dir=None, rank=rank, size=size) for f in folders)
        assert narrow.tensors.keys() == wide.tensors.keys()
        for name, tensor in narrow.tensors.items():
            assert torch.equal(tensor, wide.tensors[name]), name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("block", [BLOCK, KEPT_BLOCK], ids=str)
def test_what_is_kept_in_eight_bits_has_the_same_values(make_folders, size, block):
    folders, kept = make_folders(block), set()
    for rank in range(size):
        narrow, wide = (
            load_checkpoint(folder, dtype="fp32", cache_dir=None, rank=rank, size=size, keeps_fp8=True)
            for folder in folders
        )
        assert narrow.tensors.keys() == wide.tensors.keys()
        for name, tensor in narrow.tensors.items():
            if isinstance(tensor, Floats8):
                kept.add(name.rpartition(".")[2])
                tensor = tensor.dense()
            assert torch.equal(tensor, wide.tensors[name]), name
    # Where a rank's columns begin within a group, what it has of a tensor becomes wide.
    assert kept >= ({"qkv", "gate_up"} if block == KEPT_BLOCK else set())
    assert not kept or block == KEPT_BLOCK


def test_nan_in_eight_bits_is_refused_by_its_tensor(make_folders):
    folder, _ = make_folders(KEPT_BLOCK)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name].view(torch.uint8)[3, 4] = 0xFF
    save_file(tensors, folder / "model.safetensors")
    value = r"1 values that are not finite, the first at \[3, 4\]"
    for keeps_fp8, words in ((False, value), (True, "blocks that are not finite")):
        with pytest.raises(ModelLoadError, match=rf"tensor {name} holds {words}"):
            load_checkpoint(folder, dtype="fp32", cache_dir=None, keeps_fp8=keeps_fp8)


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
