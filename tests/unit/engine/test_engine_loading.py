"""What is refused at load, and what the message says."""

import json
import logging
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import llm_engine
from llm_engine import Engine, EngineConfig, ModelLoadError, memory
from llm_engine import rank as rank_module
from llm_engine.architecture import from_gguf
from llm_engine.gguf_reader import GgufFile
from llm_engine.memory import enough_memory_for
from llm_engine.ranks import Alone
from llm_engine.scoring import log_probabilities
from llm_engine.weights import load_checkpoint

HIDDEN = 32


def load(path, **settings):
    return load_checkpoint(path, **{"dtype": "fp32", "cache_dir": None, **settings})


def refusal(path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_gguf_and_folder_of_the_same_model_give_the_same_weights(make_folder, make_gguf):
    folder, gguf = load(make_folder()), load(make_gguf())
    assert folder.tensors.keys() == gguf.tensors.keys()
    for name, tensor in folder.tensors.items():
        assert torch.equal(tensor, gguf.tensors[name]), name
    for field in ("head_dim", "rope_base", "eos_token_ids", "bos_token_id", "context_token_count"):
        assert getattr(folder.architecture, field) == getattr(gguf.architecture, field)


def test_a_tied_model_has_no_output_matrix(make_folder, make_gguf):
    folder = load(make_folder({"tie_word_embeddings": True}, {"lm_head.weight": None}))
    gguf = load(make_gguf(tensors={"output.weight": None}))
    assert "output" not in folder.tensors and "output" not in gguf.tensors


@pytest.mark.parametrize(("changes", "expected"), [({}, 21664), ({"output.weight": None}, 18592)])
def test_a_rank_lets_go_of_the_weights_as_they_were_read(make_gguf, changes, expected):
    # In fp16, which torch multiplies in fp32.
    config = EngineConfig(model_path=str(make_gguf(tensors=changes)), dtype="fp16", cpu_kernels=False)
    loaded = rank_module.LoadedRank(config, 0)
    read = [weakref.ref(tensor) for name, tensor in loaded.checkpoint.tensors.items() if name.endswith("down")]
    _rank = loaded.ready(Alone())
    assert [reference() for reference in read] == [None, None]
    assert Engine(config).model_info.parameter_count == expected


def test_sharded_folders_are_read_through_their_index(make_folder, tiny_tensors):
    folder = make_folder()
    whole = load(folder).tensors
    tensors = tiny_tensors
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    sharded = load(folder).tensors
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    (folder / "b.safetensors").unlink()
    message = refusal_of_part(folder)
    assert (
        f"b.safetensors: there is no such file, in which by model.safetensors.index.json tensor {names[1]}" in message
    )


def test_a_shard_that_the_others_names_say_there_is_is_missed_without_an_index_too(make_folder, tiny_tensors):
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    names = sorted(tiny_tensors)
    for number in (1, 2, 3):
        part = {name: tiny_tensors[name] for name in names[number - 1 :: 3]}
        save_file(part, folder / f"model-{number:05}-of-00003.safetensors")
    load(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    words = "model-00002-of-00003.safetensors: there is no such file, and model-00001-of-00003.safetensors says"
    assert words in refusal_of_part(folder)


def test_what_is_wrong_with_a_tensor_is_told_with_the_file_that_it_lies_in(make_folder, tiny_tensors):
    def folder_with(tensor: torch.Tensor) -> Path:
        folder, norm = make_folder(), "model.norm.weight"
        (folder / "model.safetensors").unlink()
        rest = {name: each for name, each in tiny_tensors.items() if name != norm}
        save_file(rest, folder / "model-00001-of-00002.safetensors")
        save_file({norm: tensor}, folder / "model-00002-of-00002.safetensors")
        return folder

    place = "model-00002-of-00002.safetensors: tensor model.norm.weight "
    assert f"{place}has shape [3], expected [{HIDDEN}]" in refusal_of_part(folder_with(torch.ones(3)))
    assert f"{place}has type I64" in refusal_of_part(folder_with(torch.ones(HIDDEN, dtype=torch.int64)))
    spoiled = torch.ones(HIDDEN)
    spoiled[[4, 9]] = torch.tensor([torch.inf, torch.nan])
    assert f"{place}holds 2 values that are not finite, the first at [4]" in refusal_of_part(folder_with(spoiled))


def test_numbers_beyond_the_wanted_type_are_refused_with_the_largest(make_folder, tiny_tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    large = tiny_tensors[name].clone()
    large[3, 5] = -1e6
    folder = make_folder(tensors={name: large})
    load_checkpoint(folder, dtype="bf16", cache_dir=None)
    with pytest.raises(ModelLoadError, match=rf"tensor {name} holds 1e\+06, which is beyond what fp16 can hold"):
        load_checkpoint(folder, dtype="fp16", cache_dir=None)


def refusal_of_part(folder) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    return str(caught.value)


def test_a_gguf_cut_anywhere_is_refused_with_numbers(make_gguf):
    path = make_gguf()
    whole = path.read_bytes()
    for cut in (0, 3, 4, 10, 24, 60, 400, 1500, len(whole) // 2, len(whole) - 1024, len(whole) - 129):
        path.write_bytes(whole[:cut])
        message = refusal(path)
        assert cut < 4 or str(cut) in message, (cut, message)
    assert "tensor blk.1.ffn_down.weight" in message or "tensor" in message


def test_absurd_counts_in_a_gguf_are_refused_and_not_allocated(make_gguf):
    path = make_gguf()
    whole = bytearray(path.read_bytes())
    for place in (8, 16):
        damaged = bytearray(whole)
        damaged[place : place + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        message = refusal(path)
        assert "truncated" in message or "dimensions" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "mamba"}, ["general.architecture", "'mamba'"]),
        ({"fields": {"llama.expert_count": 8}}, ["llama.expert_count"]),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, ["llama.rope.scaling.type", "'yarn'"]),
        ({"fields": {"llama.rope.dimension_count": 4}}, ["llama.rope.dimension_count", "4"]),
        ({"fields": {"llama.embedding_length": None}}, ["llama.embedding_length", "missing"]),
        ({"fields": {"llama.attention.head_count_kv": 3}}, ["4 heads", "3 KV heads"]),
        ({"fields": {"tokenizer.ggml.eos_token_id": 96}}, ["special token 96", "96"]),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, ["blk.1.ffn_up.weight", "[48, 32]", "missing"]),
        (
            {"tensors": {"blk.0.attn_k.weight": np.zeros((8, HIDDEN), np.float32)}},
            ["blk.0.attn_k.weight", "[8, 32]", "[16, 32]"],
        ),
        ({"tensors": {"rope_freqs.weight": np.ones(3, np.float32)}}, ["rope_freqs.weight", "[3]", "[4]"]),
        ({"tensors": {"rope_freqs.weight": np.zeros(4, np.float32)}}, ["rope_freqs.weight", "0.0", "above 0"]),
        ({"tensors": {"rope_factors_long.weight": np.ones(4, np.float32)}}, ["rope_factors_long.weight", "supported"]),
        (
            {"tensors": {"output_norm.weight": np.full(HIDDEN, np.nan, np.float32)}},
            ["output_norm.weight", "not finite"],
        ),
    ],
)
def test_a_gguf_that_is_not_supported_is_refused_by_name(make_gguf, changes, words):
    message = refusal(make_gguf(**changes))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, ["model_type", "'mamba'"]),
        ({"model_type": "qwen2"}, ["architectures", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["original_max_position_embeddings", "missing"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["rope scaling", "'longrope'"]),
        ({"sliding_window": 512}, ["sliding_window", "512"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope scaling", "'dynamic'"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "missing"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": 3}, ["model.layers.2", "missing"]),
        ({"num_hidden_layers": 1}, ["model.layers.1", "not supported"]),
        ({"vocab_size": 97}, ["model.embed_tokens.weight", "[96, 32]", "[97, 32]"]),
        ({"head_dim": 7}, ["head_dim", "7"]),
    ],
)
def test_a_folder_that_is_not_supported_is_refused_by_name(make_folder, fields, words):
    message = refusal_of_part(make_folder(fields))
    assert [word for word in words if word not in message] == []


QWEN_MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 8, "q_lora_rank": None,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (QWEN2, ["model.layers.0.self_attn.q_proj.bias", "[32]", "missing"]),
        (QWEN3, ["model.layers.0.self_attn.q_norm.weight", "[8]", "missing"]),
        ({**QWEN3, "head_dim": None}, ["q_proj.weight", "[32, 32]", "[512, 32]"]),
        ({**QWEN3, "attention_bias": True}, ["attention_bias", "True"]),
        ({**QWEN2, "use_sliding_window": True}, ["use_sliding_window", "True"]),
        (QWEN_MOE, ["model.layers.0.self_attn.q_norm.weight", "missing"]),
        ({**QWEN_MOE, "num_experts": None}, ["num_experts", "missing"]),
        ({**QWEN_MOE, "num_experts_per_tok": 5}, ["5 experts", "4"]),
        ({**QWEN_MOE, "moe_intermediate_size": 0}, ["intermediate_size", "0"]),
        ({**QWEN_MOE, "decoder_sparse_step": 0}, ["decoder_sparse_step", "0"]),
        ({**QWEN_MOE, "mlp_only_layers": ["1"]}, ["mlp_only_layers", "'1'"]),
        (DEEPSEEK, ["model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "[12, 32]", "missing"]),
        ({**DEEPSEEK, "kv_lora_rank": None}, ["kv_lora_rank", "missing"]),
        ({**DEEPSEEK, "n_group": 3}, ["8 experts", "3 equal groups"]),
        ({**DEEPSEEK, "topk_group": 3}, ["3 groups of 2"]),
        ({**DEEPSEEK, "n_group": 8, "topk_group": 4}, ["1 experts each", "by 2 experts"]),
        ({**DEEPSEEK, "scoring_func": "softmax"}, ["scoring_func", "softmax"]),
        ({**DEEPSEEK, "topk_method": "greedy"}, ["topk_method", "greedy"]),
        ({**DEEPSEEK, "moe_layer_freq": 2}, ["moe_layer_freq", "2"]),
    ],
)
def test_a_folder_of_another_family_is_refused_by_name(make_folder, fields, words):
    message = refusal_of_part(make_folder(fields))
    assert [word for word in words if word not in message] == []


def test_a_gguf_that_tells_no_vocabulary_is_refused():
    fields = {
        "general.architecture": "llama", "llama.attention.head_count": 4, "llama.embedding_length": 32,
        "llama.block_count": 2, "llama.feed_forward_length": 48, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    with pytest.raises(ModelLoadError, match=r"llama\.vocab_size is missing"):
        from_gguf(Path("tiny.gguf"), fields)


def test_a_gguf_is_stretched_by_its_factor_unless_its_type_says_none(make_gguf):
    factor = {"llama.rope.scaling.factor": 4.0}
    for kind, expected in ((None, 4.0), ("linear", 4.0), ("none", None)):
        scaling = load(make_gguf({**factor, "llama.rope.scaling.type": kind})).architecture.rope_scaling
        assert (scaling and scaling.factor) == expected


def test_a_gguf_whose_frequencies_have_factors_is_the_folder_that_is_stretched_as_llama_3_1(
    make_folder, make_gguf, make_engine
):
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    # As llama.cpp's converter works them out, of heads of 8.
    factors = np.empty(4, np.float32)
    for pair in range(4):
        wavelength = 2 * np.pi * 10000.0 ** (2 * pair / 8)
        smooth = (128 / wavelength - 1.0) / (4.0 - 1.0)
        factors[pair] = 1.0 if smooth > 1 else 8.0 if smooth < 0 else 1 / ((1 - smooth) / 8.0 + smooth)
    assert len(set(factors)) == 3

    def held(path):
        return torch.tensor(log_probabilities(make_engine(path), [index * 7 % 90 for index in range(100)]))

    plain = held(make_gguf())
    folder = held(make_folder({"rope_scaling": llama3}))
    gguf = held(make_gguf(tensors={"rope_freqs.weight": factors}))
    assert (folder - gguf).abs().max() < 1e-4
    assert (folder - plain).abs().max() > 0.1


def test_layers_that_guess_ahead_are_left_unread(make_folder, tiny_tensors):
    beyond = {f"model.layers.2.{name}": torch.ones(3) for name in ("eh_proj.weight", "enorm.weight")}
    assert "model.layers.2.eh_proj.weight is not supported" in refusal_of_part(make_folder(tensors=beyond))
    assert (
        load(make_folder({"num_nextn_predict_layers": 1}, beyond)).tensors.keys() == load(make_folder()).tensors.keys()
    )


def test_a_context_stretched_by_yarn_is_the_longer_of_what_the_files_call_so(make_folder):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    for stated, expected in ((128, 512), (512, 512), (1024, 1024)):
        folder = make_folder({"max_position_embeddings": stated, "rope_scaling": yarn})
        assert load(folder).architecture.context_token_count == expected


def test_weights_that_are_no_plain_floats_are_refused(make_folder, tiny_tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        message = refusal_of_part(make_folder(tensors={name: tiny_tensors[name].to(dtype)}))
        assert name in message and "expected F64 or F32 or F16 or BF16" in message


def test_a_tensor_in_two_files_is_refused(make_folder, tiny_tensors):
    folder = make_folder()
    save_file({"lm_head.weight": tiny_tensors["lm_head.weight"] * 2}, folder / "older.safetensors")
    assert "older.safetensors: tensor lm_head.weight is in model.safetensors too" in refusal_of_part(folder)


@pytest.mark.parametrize("places", [None, {}, {"lm_head.weight": 5}, ["model.safetensors"]])
def test_an_index_that_is_no_table_is_refused(make_folder, places):
    folder = make_folder()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "weight_map" in refusal_of_part(folder)


def test_damaged_folders_are_refused_by_file(make_folder, tmp_path):
    assert "nowhere" in refusal_of_part(tmp_path / "nowhere")
    folder = make_folder(tensors={"lm_head.weight": None})
    assert "lm_head.weight" in refusal_of_part(folder)
    (make_folder() / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal_of_part(folder)
    for damaged in ("{", "[" * 100_000):
        (folder / "config.json").write_text(damaged)
        assert "config.json: cannot be read" in refusal_of_part(folder)


def test_a_folders_file_that_is_cut_is_refused_with_the_first_tensor_beyond_its_end(make_folder):
    folder = make_folder()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:data_start])
    begins_at = {entry["data_offsets"][0]: name for name, entry in header.items()}
    for place in sorted(begins_at)[::5]:
        end, cut = data_start + header[begins_at[place]]["data_offsets"][1], data_start + place + 4
        file.write_bytes(whole[:cut])
        expected = f"model.safetensors: truncated: tensor {begins_at[place]} ends at byte {end}, the file has {cut}"
        assert expected in refusal_of_part(folder)
    file.write_bytes(whole[:100])
    assert f"truncated: the header ends at byte {data_start}, the file has 100" in refusal_of_part(folder)
    for damaged in (b"", whole[:5], b"\xff" * 64, (10).to_bytes(8, "little") + b"[" * 10):
        file.write_bytes(damaged)
        assert "model.safetensors: " in refusal_of_part(folder)


def test_the_weight_cache_gives_the_same_weights_and_follows_the_file(make_gguf, tmp_path):
    cache = tmp_path / "cache"
    path = make_gguf()
    first = load(path, dtype="bf16", cache_dir=cache)
    assert len(list(cache.iterdir())) == 1
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    second = load(path, dtype="bf16", cache_dir=cache)
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    load(path, dtype="fp32", cache_dir=cache)
    assert len(list(cache.iterdir())) == 2
    os.utime(path, ns=(1, 1))
    load(path, dtype="bf16", cache_dir=cache)
    assert len(list(cache.iterdir())) == 3


def test_each_rank_of_a_gguf_has_its_part_of_the_weights_and_a_cache_of_its_own(make_gguf, tmp_path):
    path, cache = make_gguf(), tmp_path / "cache"
    whole = load(path).tensors
    for _ in range(2):
        ranks = [load(path, cache_dir=cache, rank=rank, size=2).tensors for rank in range(2)]
        assert len(list(cache.iterdir())) == 2
        for name, axis in (("embedding", 0), ("layers.1.attention_output", 1), ("layers.0.down", 1)):
            assert torch.equal(torch.cat([tensors[name] for tensors in ranks], dim=axis), whole[name]), name
        for tensors in ranks:
            # A view of the whole would keep all of it in memory.
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())


def test_a_damaged_weight_cache_is_rebuilt_and_one_that_cannot_be_written_costs_nothing(make_gguf, tmp_path, caplog):
    cache, path = tmp_path / "cache", make_gguf()
    sound = load(path, cache_dir=cache)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    for damage in (content[: len(content) // 2], b"", content[:8] + b"#" * 100):
        file.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            again = load(path, cache_dir=cache)
        assert "will be rebuilt" in caplog.text
        caplog.clear()
        assert all(torch.equal(sound.tensors[name], again.tensors[name]) for name in sound.tensors)
        assert file.read_bytes() == content
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING):
        load(path, cache_dir=blocked)
    assert "cannot be written" in caplog.text


def test_settings_are_refused_all_at_once():
    with pytest.raises(ValueError, match=r"dtype is 'int3'.*max_sequences is 0.*step_token_budget"):
        EngineConfig(model_path="x", dtype="int3", max_sequences=0, step_token_budget=-1)
    with pytest.raises(ValueError, match="step_token_budget is 8, expected at least max_sequences"):
        EngineConfig(model_path="x", max_sequences=9, step_token_budget=8)


def test_a_kv_bound_without_room_for_a_block_names_the_bytes(make_engine):
    with pytest.raises(ModelLoadError, match="kv_cache_bytes is 1000, expected at least 2048"):
        make_engine(kv_cache_bytes=1000)


@pytest.mark.parametrize(
    # All but five norms is rounded to eight bits.
    ("dtype", "weight_bytes"),
    [("fp32", 4 * 21664), ("bf16", 2 * 21664), ("int8", 21664 + 3 * 5 * HIDDEN)],
)
def test_more_memory_than_there_is_is_refused_with_all_numbers_before_the_weights_are_read(
    make_folder, make_engine, monkeypatch, dtype, weight_bytes
):
    # A number that is none, which reading would find first.
    path = make_folder(tensors={"model.norm.weight": torch.full((HIDDEN,), torch.nan)})
    monkeypatch.setattr(rank_module, "machine_bytes", lambda: 1000 + weight_bytes)
    words = (
        f"{path}: the weights take {weight_bytes} bytes and kv_cache_bytes is {{}} for each of 1 ranks, but there are"
    )
    with pytest.raises(ModelLoadError, match=words.format(1001)):
        make_engine(path, dtype=dtype, kv_cache_bytes=1001)
    with pytest.raises(ModelLoadError, match="not finite"):
        make_engine(path, dtype=dtype, kv_cache_bytes=1000)


def test_more_memory_than_is_free_is_refused_and_with_it_what_a_gpu_lacks(make_folder, make_engine, monkeypatch):
    path, weight_bytes = make_folder(), 4 * 21664
    monkeypatch.setattr(rank_module, "free_bytes", lambda: 1000 + weight_bytes)
    with pytest.raises(
        ModelLoadError, match=f"1001 for each of 1 ranks, but {1000 + weight_bytes} bytes of memory are"
    ):
        make_engine(path, dtype="fp32", kv_cache_bytes=1001)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    config = EngineConfig(model_path=str(path), kv_cache_bytes=900)
    rank_module._check_room(config, torch.device("cuda:1"), 100)
    with pytest.raises(ModelLoadError, match="but 1000 bytes of cuda:1 are free"):
        rank_module._check_room(config, torch.device("cuda:1"), 101)


def test_free_memory_is_what_the_machine_and_the_container_have_left(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.free_bytes() == memory.machine_bytes()
    (tmp_path / "meminfo").write_text("MemTotal:  20000 kB\nMemFree:  10 kB\nMemAvailable:  5000 kB\n")
    assert memory.free_bytes() == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert memory.free_bytes() == 5000 * 1024
    (tmp_path / "memory.max").write_text("4000000\n")
    assert memory.free_bytes() == 4000000 - 2500000


def test_each_rank_counts_its_own_part_and_blocks_as_the_file_has_them(make_gguf):
    wide = np.ones((48, HIDDEN), np.float32)
    path = make_gguf(tensors={f"blk.{layer}.ffn_up.weight": (wide, "Q4_1") for layer in range(2)})
    counts = []
    for size in (1, 2):
        load(path, size=size, check_room=counts.append)
    numbers, norms, in_blocks = 21664, 5 * HIDDEN, 2 * wide.size
    plain = 4 * (numbers - norms - in_blocks) + in_blocks * 20 // 32
    assert counts == [plain + 4 * norms, plain // 2 + 4 * norms]


def test_what_torch_says_of_memory_is_a_load_error_and_nothing_else():
    said = r"the weights cannot be held in memory: .*allocate"
    with pytest.raises(ModelLoadError, match=said), enough_memory_for("the weights"):
        torch.empty(1 << 60)
    for words in ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory"):
        with pytest.raises(ModelLoadError, match=words), enough_memory_for("the weights"):
            raise RuntimeError(words)
    with pytest.raises(ModelLoadError), enough_memory_for("the weights"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="illegal"), enough_memory_for("the weights"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_rank_on_a_gpu_makes_it_the_current_one_before_it_reads_anything(make_folder, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(rank_module, "load_checkpoint", lambda *paths, **settings: calls.append("read") or 1 / 0)
    config = EngineConfig(model_path=str(make_folder()), device="cuda", tensor_parallel_size=2)
    with pytest.raises(ZeroDivisionError):
        rank_module.LoadedRank(config, 1)
    assert calls == [torch.device("cuda", 1), "read"]


def test_a_context_beyond_the_model_is_refused(make_engine):
    with pytest.raises(ModelLoadError, match=r"max_context_tokens is 129.* 128"):
        make_engine(max_context_tokens=129)


def test_the_engine_imports_neither_grpc_nor_triton_nor_tidegate():
    for file in Path(llm_engine.__file__).parent.glob("*.py"):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in ("grpc", "tidegate", "triton_python_backend_utils"), file


def test_the_texts_of_a_gguf_files_vocabulary_can_be_read(make_gguf):
    file = GgufFile(make_gguf())
    assert file.strings("tokenizer.ggml.tokens") == [f"t{index}" for index in range(96)]
    for name in ("general.architecture", "tokenizer.ggml.merges"):
        with pytest.raises(ModelLoadError, match=name):
            file.strings(name)
