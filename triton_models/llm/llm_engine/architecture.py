"""What a model's files say about its shape and its mathematics.

Owns the reading of GGUF metadata and of Hugging Face's config.json into one `Architecture`.
Invariant: whatever changes the mathematics and is not supported is refused by its name, never
ignored. Supported is the Llama architecture (Touvron et al., 2023) with grouped-query attention,
rotary positions (plain, "linear" or "llama3" scaling) and tied or separate output weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelLoadError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched; "linear" uses `factor` alone."""

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_token_count: int = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Llama model's sizes and constants."""

    name: str
    layer_count: int
    hidden_size: int
    intermediate_size: int
    head_count: int
    kv_head_count: int
    head_dim: int
    vocabulary_size: int
    context_token_count: int
    rope_base: float
    rope_scaling: RopeScaling | None
    norm_epsilon: float
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.head_count // self.kv_head_count

    @property
    def query_size(self) -> int:
        """Columns of the query projection."""
        return self.head_count * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.kv_head_count * self.head_dim


# Fields of "llama.*" that are read, or that say nothing about the mathematics.
_GGUF_FIELDS = frozenset(
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "vocab_size",
    ]
)

# Fields of config.json that change the mathematics, with the values under which they do not.
_REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (False,),
}


def from_gguf(path: Path, metadata: Mapping[str, object]) -> Architecture:
    """Read the metadata of a GGUF file."""
    fields = _Fields(path, metadata)
    fields.expect("general.architecture", ("llama",))
    for key in metadata:
        if key.startswith("llama.") and key.removeprefix("llama.") not in _GGUF_FIELDS:
            raise ModelLoadError(f"{path}: field {key} is not supported")
    heads = fields.integer("llama.attention.head_count")
    hidden = fields.integer("llama.embedding_length")
    head_dim = fields.integer("llama.attention.key_length", default=hidden // max(heads, 1))
    fields.expect("llama.rope.dimension_count", (head_dim,), default=head_dim)
    fields.expect("llama.attention.value_length", (head_dim,), default=head_dim)
    scaling = fields.text("llama.rope.scaling.type", default="none")
    if scaling not in ("none", "linear"):
        raise ModelLoadError(f"{path}: field llama.rope.scaling.type: {scaling!r} is not supported")
    factor = fields.number("llama.rope.scaling.factor", default=1.0)
    # Without a type, llama.cpp divides by the factor all the same.
    linear = None if factor in (0.0, 1.0) else RopeScaling(kind="linear", factor=factor)
    ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return _checked(
        path,
        name=fields.text("general.name", default=path.stem),
        layer_count=fields.integer("llama.block_count"),
        hidden_size=hidden,
        intermediate_size=fields.integer("llama.feed_forward_length"),
        head_count=heads,
        kv_head_count=fields.integer("llama.attention.head_count_kv", default=heads),
        head_dim=head_dim,
        vocabulary_size=fields.integer("llama.vocab_size", default=metadata.get("tokenizer.ggml.tokens")),
        context_token_count=fields.integer("llama.context_length"),
        rope_base=fields.number("llama.rope.freq_base", default=10000.0),
        rope_scaling=linear,
        norm_epsilon=fields.number("llama.attention.layer_norm_rms_epsilon"),
        eos_token_ids=tuple(dict.fromkeys(fields.integer(key) for key in ends if key in metadata)),
        bos_token_id=fields.integer("tokenizer.ggml.bos_token_id", default=None),
    )


def from_hugging_face(path: Path, config: Mapping[str, object], generation: Mapping[str, object]) -> Architecture:
    """Read config.json and generation_config.json; `path` is the former's, for messages."""
    fields = _Fields(path, config)
    fields.expect("model_type", ("llama",))
    fields.expect("architectures", (["LlamaForCausalLM"],), default=["LlamaForCausalLM"])
    for key, values in _REQUIRED_VALUES.items():
        fields.expect(key, values, default=values[0])
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    rope = _Fields(path, {**config, **_rope_parameters(config)})
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return _checked(
        path,
        name=str(config.get("_name_or_path") or path.parent.name),
        layer_count=fields.integer("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        head_count=heads,
        kv_head_count=fields.integer("num_key_value_heads", default=heads),
        head_dim=fields.integer("head_dim", default=hidden // max(heads, 1)),
        vocabulary_size=fields.integer("vocab_size"),
        context_token_count=fields.integer("max_position_embeddings", default=2048),
        rope_base=rope.number("rope_theta", default=10000.0),
        rope_scaling=_rope_scaling(path, rope),
        norm_epsilon=fields.number("rms_norm_eps", default=1e-6),
        eos_token_ids=tuple(eos if isinstance(eos, list) else () if eos is None else (eos,)),
        bos_token_id=fields.integer("bos_token_id", default=None),
    )


def _rope_parameters(config: Mapping[str, object]) -> Mapping[str, object]:
    """Older files say rope_scaling, newer ones rope_parameters, which also holds rope_theta."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found if isinstance(found, Mapping) else {"rope_type": found}


def _rope_scaling(path: Path, fields: "_Fields") -> RopeScaling | None:
    fields.expect("partial_rotary_factor", (1.0,), default=1.0)
    kind = fields.text("rope_type", default=fields.text("type", default="default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind=kind, factor=fields.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=fields.number("factor"),
            low_frequency_factor=fields.number("low_freq_factor"),
            high_frequency_factor=fields.number("high_freq_factor"),
            original_context_token_count=fields.integer("original_max_position_embeddings"),
        )
    raise ModelLoadError(f"{path}: rope scaling {kind!r} is not supported (linear and llama3 are)")


def _checked(path: Path, **values: object) -> Architecture:
    """Build the architecture, refusing sizes that do not fit together."""
    architecture = Architecture(**values)
    for name in _POSITIVE:
        if not 0 < getattr(architecture, name) < math.inf:
            raise ModelLoadError(f"{path}: {name} is {getattr(architecture, name)}, expected more than 0")
    if architecture.head_count % architecture.kv_head_count:
        raise ModelLoadError(
            f"{path}: {architecture.head_count} heads cannot share {architecture.kv_head_count} KV heads"
        )
    if architecture.head_dim % 2:
        raise ModelLoadError(f"{path}: head_dim is {architecture.head_dim}, expected an even number")
    for token in (*architecture.eos_token_ids, architecture.bos_token_id or 0):
        if type(token) is not int or not 0 <= token < architecture.vocabulary_size:
            raise ModelLoadError(
                f"{path}: special token {token!r} is not in the vocabulary of {architecture.vocabulary_size}"
            )
    return architecture


_POSITIVE = (
    "layer_count", "hidden_size", "intermediate_size", "head_count", "kv_head_count", "head_dim",
    "vocabulary_size", "context_token_count", "rope_base", "norm_epsilon",
)  # fmt: skip
_MISSING = object()


class _Fields:
    """Reads typed fields of a file, naming file and field where one is missing or odd."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self._path = path
        self._values = values

    def integer(self, key: str, *, default: Any = _MISSING) -> Any:
        return self._typed(key, int, default)

    def number(self, key: str, *, default: Any = _MISSING) -> Any:
        value = self._typed(key, (int, float), default)
        return value if value is None else float(value)

    def text(self, key: str, *, default: Any = _MISSING) -> Any:
        return self._typed(key, str, default)

    def expect(self, key: str, values: tuple[object, ...], *, default: Any = _MISSING) -> None:
        """Refuse a value that is not one of `values`."""
        value = self._typed(key, object, default)
        if value not in values:
            raise ModelLoadError(f"{self._path}: field {key} is {value!r}: not supported")

    def _typed(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is _MISSING:
            raise ModelLoadError(f"{self._path}: field {key} is missing")
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ModelLoadError(f"{self._path}: field {key} is {value!r}: not the expected type")
        return value
