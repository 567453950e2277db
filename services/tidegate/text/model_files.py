"""What the mesh must know of a model to speak for it: tokenizer, chat template, context length.

A model is a path: a GGUF file, or a folder as Hugging Face has them. Weights are not touched, so this takes a
fraction of a second and little memory; it is read once a process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import models, pre_tokenizers

from tidegate.text.chat_template import ChatTemplate, ChatTemplateError
from tidegate.text.gguf_metadata import ModelFileError, read_metadata
from tidegate.text.tokenizer import Tokenizer, byte_level_alphabet

__all__ = ["ModelFileError", "TextModel", "load_text_model"]

END_TEXTS: Final = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "</s>"}
)
"""Special tokens that end an answer in the common model families, whatever else the metadata names."""

PLAIN_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""For base models, which have no template of their own."""

_CONTROL: Final = 3
_USER_DEFINED: Final = 4


@dataclass(frozen=True, slots=True)
class TextModel:
    """One model's words."""

    name: str
    """The id that clients use."""
    context_token_count: int
    """Prompt and answer together have at most so many tokens."""
    vocabulary_size: int
    """Token ids run from 0 to this, exclusive."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer; the first is the model's own."""
    bos_token_id: int | None
    """The token that begins a sequence, where the model has one."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate


def load_text_model(path: str, model_name: str, *, context_token_limit: int | None = None) -> TextModel:
    """Reads a GGUF file, or a Hugging Face folder (tokenizer.json, config.json, tokenizer_config.json).

    Args:
        path: the file or folder.
        model_name: the id that clients use.
        context_token_limit: a smaller context than the model's own, where the engine is set up with one.

    Raises:
        ModelFileError: something is missing or not understood; the message names the file.
    """
    location = Path(path)
    if location.is_dir():
        parts = _from_folder(location)
    elif location.is_file():
        parts = _from_gguf(location)
    else:
        raise ModelFileError(f"{path}: there is no such file or folder")
    return _assemble(location, model_name, parts, context_token_limit)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What both kinds of files say."""

    encoder: tokenizers.Tokenizer
    special_tokens: Mapping[str, int]
    bytes_of_token: Callable[[int], bytes]
    vocabulary_size: int
    longest_token_bytes: int
    context_token_count: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    starts_with_bos: bool
    template_source: str


def _assemble(location: Path, model_name: str, parts: _Parts, context_token_limit: int | None) -> TextModel:
    text_of_id = {token_id: text for text, token_id in parts.special_tokens.items()}
    bos_id = parts.bos_token_id
    try:
        chat_template = ChatTemplate(
            parts.template_source,
            special_texts=parts.special_tokens,
            bos_text="" if bos_id is None else text_of_id.get(bos_id, ""),
            eos_text=text_of_id.get(parts.eos_token_ids[0], "") if parts.eos_token_ids else "",
        )
    except ChatTemplateError as error:
        raise ModelFileError(f"{location}: {error}") from error
    ends = [token_id for text, token_id in parts.special_tokens.items() if text in END_TEXTS]
    prefix = [bos_id] if parts.starts_with_bos and bos_id is not None else []
    return TextModel(
        name=model_name,
        context_token_count=min(parts.context_token_count, context_token_limit or parts.context_token_count),
        vocabulary_size=parts.vocabulary_size,
        eos_token_ids=tuple(dict.fromkeys([*parts.eos_token_ids, *ends])),
        bos_token_id=bos_id,
        tokenizer=Tokenizer(
            parts.encoder,
            parts.special_tokens,
            parts.bytes_of_token,
            parts.vocabulary_size,
            parts.longest_token_bytes,
            prefix,
        ),
        chat_template=chat_template,
    )


def _from_gguf(path: Path) -> _Parts:
    metadata = read_metadata(path)

    def required(key: str) -> Any:
        if key not in metadata:
            raise ModelFileError(f"{path}: has no {key}")
        return metadata[key]

    family = required("tokenizer.ggml.model")
    if family != "gpt2":
        raise ModelFileError(f"{path}: tokenizer.ggml.model {family!r} is not supported (only gpt2, byte-level BPE)")
    texts: list[str] = required("tokenizer.ggml.tokens")
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(texts)
    special_tokens = {text: i for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind == _CONTROL}
    added = {text: i for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind == _USER_DEFINED}
    pairs = [(left, right) for left, _, right in (text.partition(" ") for text in required("tokenizer.ggml.merges"))]
    encoder = tokenizers.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=pairs))
    encoder.pre_tokenizer = _pre_tokenizer(path, metadata.get("tokenizer.ggml.pre", "gpt-2"))
    encoder.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return _Parts(
        encoder=encoder,
        special_tokens=special_tokens,
        bytes_of_token=_byte_level_bytes(texts.__getitem__, added.values()),
        vocabulary_size=len(texts),
        longest_token_bytes=max(map(len, texts), default=1),  # One letter a byte, in a byte-level vocabulary.
        context_token_count=required(f"{required('general.architecture')}.context_length"),
        eos_token_ids=() if eos is None else (eos,),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        starts_with_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        template_source=metadata.get("tokenizer.chat_template") or PLAIN_CHAT_TEMPLATE,
    )


def _pre_tokenizer(path: Path, name: str) -> pre_tokenizers.PreTokenizer:
    """How the text is cut before the merges; a GGUF file only names the rule."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "gpt-2":
        return byte_level
    raise ModelFileError(f"{path}: tokenizer.ggml.pre {name!r} is not supported (smollm, gpt-2); give its folder")


def _byte_level_bytes(text_of_id: Callable[[int], str | None], added_ids: Iterable[int]) -> Callable[[int], bytes]:
    alphabet, verbatim = byte_level_alphabet(), frozenset(added_ids)

    def bytes_of_token(token_id: int) -> bytes:
        text = text_of_id(token_id) or ""
        if token_id in verbatim or any(letter not in alphabet for letter in text):
            return text.encode()
        return bytes(alphabet[letter] for letter in text)

    return bytes_of_token


def _byte_count(text: str) -> int:
    return len(text.encode())


def _sentencepiece_bytes(text_of_id: Callable[[int], str | None], added_ids: Iterable[int]) -> Callable[[int], bytes]:
    verbatim = frozenset(added_ids)

    def bytes_of_token(token_id: int) -> bytes:
        text = text_of_id(token_id) or ""
        if token_id in verbatim:
            return text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace("\u2581", " ").encode()

    return bytes_of_token


def _from_folder(folder: Path) -> _Parts:
    document = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json", required=False)
    generation_config = _read_json(folder / "generation_config.json", required=False)
    all_added = document.get("added_tokens") or []
    special_tokens = {token["content"]: int(token["id"]) for token in all_added if token.get("special")}
    document["added_tokens"] = [token for token in all_added if not token.get("special")]
    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # The package raises bare Exception for a file that it does not understand.
        raise ModelFileError(f"{folder / 'tokenizer.json'}: {error}") from error
    encoder.no_truncation()
    encoder.no_padding()
    added_ids = [int(token["id"]) for token in document["added_tokens"]]
    byte_level = "ByteLevel" in json.dumps([document.get("decoder"), document.get("pre_tokenizer")])
    longest = len if byte_level else _byte_count
    bytes_of = _byte_level_bytes if byte_level else _sentencepiece_bytes
    bos_id = _token_id(tokenizer_config.get("bos_token"), special_tokens, config.get("bos_token_id"))
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    highest_id = max([*special_tokens.values(), *vocabulary.values()])
    return _Parts(
        encoder=encoder,
        special_tokens=special_tokens,
        bytes_of_token=bytes_of(encoder.id_to_token, added_ids),
        vocabulary_size=max(int(config.get("vocab_size") or 0), highest_id + 1),
        longest_token_bytes=max(map(longest, vocabulary), default=1),
        context_token_count=_context_token_count(folder, config),
        eos_token_ids=_eos_ids(tokenizer_config, special_tokens, generation_config, config),
        bos_token_id=bos_id,
        starts_with_bos=bos_id is not None and _starts_with(encoder, bos_id),
        template_source=_template_source(folder, tokenizer_config),
    )


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise ModelFileError(f"{path}: is missing") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise ModelFileError(f"{path}: is not a JSON object")
    return document


def _context_token_count(folder: Path, config: dict[str, Any]) -> int:
    """The longest context; files of models stretched by YaRN may name the length before stretching, as Qwen's do."""
    stated = _positive(folder, config, "max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or (rope.get("rope_type") or rope.get("type")) != "yarn":
        return stated
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not isinstance(factor, (int, float)) or not isinstance(original, int) or not math.isfinite(factor):
        return stated  # The engine refuses such a file and names the field.
    return max(stated, int(factor * original))


def _positive(folder: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelFileError(f"{folder / 'config.json'}: {key} must be a positive integer, is {value!r}")
    return value


def _token_id(token: Any, special_tokens: Mapping[str, int], otherwise: Any) -> int | None:
    """The id of a token that tokenizer_config.json gives as text, or as an object with its text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str) and text in special_tokens:
        return special_tokens[text]
    return otherwise if isinstance(otherwise, int) else None


def _eos_ids(
    tokenizer_config: dict[str, Any], special_tokens: Mapping[str, int], *configs: dict[str, Any]
) -> tuple[int, ...]:
    first = _token_id(tokenizer_config.get("eos_token"), special_tokens, None)
    found = [] if first is None else [first]
    for config in configs:
        value = config.get("eos_token_id")
        found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return tuple(dict.fromkeys(found))


def _starts_with(encoder: tokenizers.Tokenizer, token_id: int) -> bool:
    """Whether the model's own post-processor puts the token before every text."""
    ids = encoder.encode("", add_special_tokens=True).ids
    return bool(ids) and ids[0] == token_id


def _template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        # Several named templates; `default` is the one for plain chats.
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    return source if isinstance(source, str) and source else PLAIN_CHAT_TEMPLATE
