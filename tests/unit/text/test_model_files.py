from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tidegate.text.gguf_metadata import read_metadata
from tidegate.text.model_files import ModelFileError, TextModel, load_text_model
from tidegate.v1 import inference_pb2

TEXTS = [
    "Hello world",
    "  two  spaces 12345\n\n\ttab",
    "naïve café 你好 👩‍👩‍👧 \u2028",
    "<|im_start|>",
    "def f(x):\n    return x",
]


@pytest.fixture(scope="session")
def folder(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder, made with the tokenizers package alone."""
    metadata = read_metadata(gguf_path)
    words = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(text.split(" ")) for text in metadata["tokenizer.ggml.merges"]]
    whole = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(words[:17])
    path = tmp_path_factory.mktemp("folder")
    whole.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"max_position_embeddings": 8192, "eos_token_id": 2}))
    special = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    (path / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"])
    return path


def test_knows_the_model(model: TextModel) -> None:
    assert model.name == "smollm2-135m-instruct"
    assert (model.context_token_count, model.vocabulary_size) == (8192, 49152)
    assert model.eos_token_ids == (2, 0)
    assert model.bos_token_id == 1
    assert model.tokenizer.prefix_token_ids == ()


def test_loads_in_under_a_second_of_processor_time(gguf_path: Path) -> None:
    before = time.process_time()
    load_text_model(str(gguf_path), "m")
    assert time.process_time() - before < 1.0


def test_a_smaller_context_of_the_engine_applies(gguf_path: Path) -> None:
    assert load_text_model(str(gguf_path), "m", context_token_limit=512).context_token_count == 512
    assert load_text_model(str(gguf_path), "m", context_token_limit=1 << 20).context_token_count == 8192


def test_a_folder_speaks_like_the_gguf_file(model: TextModel, folder: Path) -> None:
    other = load_text_model(str(folder), "other")
    assert other.context_token_count == model.context_token_count
    assert other.eos_token_ids == model.eos_token_ids
    assert other.bos_token_id == model.bos_token_id
    for text in TEXTS:
        for allow_special in (False, True):
            expected = model.tokenizer.encode(text, allow_special=allow_special)
            assert other.tokenizer.encode(text, allow_special=allow_special) == expected
        assert [other.tokenizer.token_bytes(i) for i in expected] == [model.tokenizer.token_bytes(i) for i in expected]
    chat = [inference_pb2.ChatMessage(role="user", content=text) for text in TEXTS]
    assert other.chat_template.encode(chat, other.tokenizer) == model.chat_template.encode(chat, model.tokenizer)


def test_tokens_equal_those_of_the_whole_reference_tokenizer(model: TextModel, folder: Path) -> None:
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    chat = [inference_pb2.ChatMessage(role="user", content=text.replace("<|", "<")) for text in TEXTS]
    rendered = model.chat_template.render(chat)
    assert model.chat_template.encode(chat, model.tokenizer) == reference.encode(rendered).ids


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
def test_names_a_missing_file_of_a_folder(folder: Path, tmp_path: Path, missing: str) -> None:
    for file in folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelFileError, match=missing):
        load_text_model(str(tmp_path), "m")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("config.json", "{"),
        ("config.json", '{"max_position_embeddings": "many"}'),
        ("chat_template.jinja", "{% for %}"),
    ],
)
def test_refuses_a_broken_folder(folder: Path, tmp_path: Path, file: str, content: str) -> None:
    for known in folder.iterdir():
        (tmp_path / known.name).write_bytes(known.read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelFileError, match=str(tmp_path)):
        load_text_model(str(tmp_path), "m")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 2048}}, 8192),
        ({"rope_scaling": {"rope_type": "yarn"}}, 8192),
        (
            {"rope_scaling": {"type": "yarn", "factor": float("inf"), "original_max_position_embeddings": 4096}},
            8192,
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": None}, 8192),
    ],
)
def test_a_context_stretched_by_yarn_is_known(
    folder: Path, tmp_path: Path, fields: dict[str, Any], expected: int
) -> None:
    for known in folder.iterdir():
        (tmp_path / known.name).write_bytes(known.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8192, **fields}))
    assert load_text_model(str(tmp_path), "m").context_token_count == expected


def test_names_a_path_that_is_not_there() -> None:
    with pytest.raises(ModelFileError, match="/nowhere"):
        load_text_model("/nowhere", "m")


def test_sentencepiece_folders_turn_marks_and_bytes_back_into_text(tmp_path: Path) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xC3>": 3, "<0xA9>": 4, "\u2581a": 5, "b": 6}
    whole = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    whole.add_special_tokens(["<unk>", "<s>", "</s>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8, "eos_token_id": [2]}))
    tokenizer = load_text_model(str(tmp_path), "m").tokenizer
    assert tokenizer.decode([1, 5, 6, 3, 4, 2]) == " abé"
