"""What a simulated engine takes from a model's files: the vocabulary's texts and the architecture, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_engine import ModelLoadError
from llm_engine.architecture import Architecture, from_gguf, from_hugging_face
from llm_engine.gguf_reader import GgufFile


def read_model_files(path: Path) -> tuple[Architecture, list[str]]:
    """The architecture, and the text of each token in the order of the ids, as the files write it.

    Args:
        path: a GGUF file, or a Hugging Face folder with config.json and tokenizer.json.

    Raises:
        ModelLoadError: the files are not there or not as they must be.
    """
    if not path.exists():
        raise ModelLoadError(f"{path}: there is no such file or folder")
    if path.is_dir():
        return _from_folder(path)
    file = GgufFile(path)
    return from_gguf(path, file.metadata), file.strings("tokenizer.ggml.tokens")


def _from_folder(folder: Path) -> tuple[Architecture, list[str]]:
    generation = folder / "generation_config.json"
    architecture = from_hugging_face(
        folder / "config.json", _json(folder / "config.json"), _json(generation) if generation.exists() else {}
    )
    vocabulary = _json(folder / "tokenizer.json").get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict):
        raise ModelLoadError(f"{folder / 'tokenizer.json'}: model.vocab is not a table of tokens and their ids")
    texts = [""] * architecture.vocabulary_size
    for text, token_id in vocabulary.items():
        if type(token_id) is not int or not 0 <= token_id < len(texts):
            raise ModelLoadError(f"{folder / 'tokenizer.json'}: token {text!r} has the id {token_id!r}")
        texts[token_id] = text
    return architecture, texts


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: expected an object")
    return content
