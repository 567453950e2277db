"""What a model's files say about its shape and its mathematics.

Owns the reading of GGUF metadata and of Hugging Face's config.json into one `Architecture`.
Invariant: whatever changes the mathematics and is not supported is refused by its name, never
ignored. Supported are Llama (Touvron et al., 2023), Qwen2 (a bias on q, k and v), Qwen3 (a norm on each
head's query and key) and its mixture of experts, DeepSeek-V2 and -V3 (latent attention, routed and shared
experts); rotary positions plain or with "linear", "llama3" or "yarn" scaling; tied or separate output weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelLoadError
from .field_reader import MISSING, Fields
from .known_fields import DEEPSEEK_SILENT, MIXTURE_SILENT, REQUIRED_VALUES, SILENT


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched; "linear" uses `factor` and `factors` alone."""

    kind: str
    factor: float
    factors: tuple[float, ...] = ()
    """By what each frequency is divided besides; empty: by nothing."""
    original_context_token_count: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    """These two are llama3's."""
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    rounds_dimensions: bool = True
    attention_factor: float = 1.0
    """These four are YaRN's; cosines and sines are multiplied by the last."""
    softmax_factor: float = 1.0
    """DeepSeek's: what stands under the softmax is multiplied by it."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The sizes of multi-head latent attention."""

    query_rank: int | None
    """None: queries are not compressed."""
    kv_rank: int
    nope_size: int
    """Of each head's key, what positions do not turn."""
    rope_size: int
    """What they turn; all heads share it."""
    value_size: int

    @property
    def key_size(self) -> int:
        """Of each head's query and key."""
        return self.nope_size + self.rope_size


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts: which layers have one, its sizes, and how each row's experts are chosen."""

    layers: frozenset[int]
    count: int
    per_row: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    """Of the expert that all rows pass; 0 is none."""
    scoring: str = "softmax"
    """softmax over all experts, or the sigmoid of each."""
    renormalizes: bool = False
    """The chosen experts' shares are divided by their sum."""
    scale: float = 1.0
    has_choice_bias: bool = False
    """A bias that counts in choosing, and not in the shares."""
    group_count: int = 1
    groups_per_row: int = 1
    group_score_count: int = 1
    """Experts are chosen from a row's best groups, by the sum of so many of their best scores."""

    def are_in(self, layer: int) -> bool:
        """Whether a layer has a mixture; the others have one MLP."""
        return layer in self.layers


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model's sizes and constants."""

    family: str
    """The model_type of config.json."""
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
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    """Queries and keys are normalised, each head by itself, before they are turned."""
    has_interleaved_rope: bool = False
    """In the files, rows that are turned stand pair by pair, not half by half."""
    latent: Latent | None = None
    """Latent attention; all heads share one cached key, so there is one KV head, of `head_dim` turned columns."""
    experts: Experts | None = None

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

    @property
    def softmax_scale(self) -> float:
        """By what queries times keys are multiplied."""
        key_size = self.head_dim if self.latent is None else self.latent.key_size
        return key_size**-0.5 * (1.0 if self.rope_scaling is None else self.rope_scaling.softmax_factor)


# Beyond any model: what a damaged file says would be counted up to, or laid out, before a shape is missed.
_MOST_LAYERS, _MOST_EXPERTS, _MOST_TOKENS = 4096, 65_536, 1 << 31

# Of "llama.*", beside those that are read.
_GGUF_SILENT = frozenset(["llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned"])


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a model_type of config.json says beside its fields."""

    class_name: str
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    head_dim: int | None = None
    """Of a config without one; None: the hidden size divided among the heads."""
    unused: tuple[str, ...] = ()
    """Required values that say nothing here."""
    silent: frozenset[str] = frozenset()
    """Fields that say nothing in this family alone."""
    latent: Callable[[Fields], Latent] | None = None
    experts: Callable[[Fields, int], Experts | None] | None = None


def _qwen_experts(fields: Fields, layer_count: int) -> Experts | None:
    """Qwen3-MoE's fields."""
    step, dense = fields.integer("decoder_sparse_step", default=1), fields.integers("mlp_only_layers", default=[])
    if step < 1:
        raise fields.fault("decoder_sparse_step", step)
    named = fields.integer("num_local_experts", default=None)
    layers = frozenset(layer for layer in range(layer_count) if (layer + 1) % step == 0) - frozenset(dense)
    return Experts(
        layers=layers,
        count=fields.integer("num_experts", default=MISSING if named is None else named, most=_MOST_EXPERTS),
        per_row=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        renormalizes=fields.boolean("norm_topk_prob", default=False),
    )


def _deepseek_experts(fields: Fields, layer_count: int, **choice: Any) -> Experts | None:
    """The fields that DeepSeek-V2 and -V3 share."""
    fields.expect("moe_layer_freq", (1,), default=1)
    first = fields.integer("first_k_dense_replace")
    if first >= layer_count:
        return None
    size = fields.integer("moe_intermediate_size")
    return Experts(
        layers=frozenset(range(first, layer_count)),
        count=fields.integer("n_routed_experts", most=_MOST_EXPERTS),
        per_row=fields.integer("num_experts_per_tok"),
        intermediate_size=size,
        shared_intermediate_size=size * fields.integer("n_shared_experts", default=0),
        scale=fields.number("routed_scaling_factor", default=1.0),
        **choice,
    )


def _deepseek_v2_experts(fields: Fields, layer_count: int) -> Experts | None:
    fields.expect("scoring_func", ("softmax",), default="softmax")
    fields.expect("norm_topk_prob", (False,), default=False)
    fields.expect("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    if fields.text("topk_method", default="greedy") == "greedy":
        return _deepseek_experts(fields, layer_count)
    groups, per_row = fields.integer("n_group"), fields.integer("topk_group")
    return _deepseek_experts(fields, layer_count, group_count=groups, groups_per_row=per_row)


def _deepseek_v3_experts(fields: Fields, layer_count: int) -> Experts | None:
    fields.expect("scoring_func", ("sigmoid",), default="sigmoid")
    fields.expect("topk_method", ("noaux_tc",), default="noaux_tc")
    return _deepseek_experts(
        fields,
        layer_count,
        scoring="sigmoid",
        renormalizes=fields.boolean("norm_topk_prob", default=True),
        has_choice_bias=True,
        group_count=fields.integer("n_group"),
        groups_per_row=fields.integer("topk_group"),
        group_score_count=2,
    )


def _deepseek_latent(fields: Fields) -> Latent:
    return Latent(
        query_rank=fields.integer("q_lora_rank", default=None),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_size=fields.integer("qk_nope_head_dim"),
        rope_size=fields.integer("qk_rope_head_dim"),
        value_size=fields.integer("v_head_dim"),
    )


# A Qwen config always names a window; `use_sliding_window` says whether there is one.
_FAMILIES = {
    "llama": _Family(class_name="LlamaForCausalLM"),
    "qwen2": _Family(class_name="Qwen2ForCausalLM", has_qkv_bias=True, unused=("sliding_window", "attention_bias")),
    "qwen3": _Family(class_name="Qwen3ForCausalLM", has_head_norms=True, head_dim=128, unused=("sliding_window",)),
    "qwen3_moe": _Family(
        class_name="Qwen3MoeForCausalLM",
        has_head_norms=True,
        unused=("sliding_window", "num_local_experts"),
        silent=MIXTURE_SILENT,
        experts=_qwen_experts,
    ),
    "deepseek_v2": _Family(
        class_name="DeepseekV2ForCausalLM",
        silent=DEEPSEEK_SILENT,
        latent=_deepseek_latent,
        experts=_deepseek_v2_experts,
    ),
    "deepseek_v3": _Family(
        class_name="DeepseekV3ForCausalLM",
        silent=DEEPSEEK_SILENT,
        latent=_deepseek_latent,
        experts=_deepseek_v3_experts,
    ),
}


def from_gguf(path: Path, metadata: Mapping[str, object]) -> Architecture:
    """Read the metadata of a GGUF file."""
    fields = Fields(path, metadata)
    fields.expect("general.architecture", ("llama",))
    heads = fields.integer("llama.attention.head_count")
    hidden = fields.integer("llama.embedding_length")
    head_dim = fields.integer("llama.attention.key_length", default=hidden // max(heads, 1))
    fields.expect("llama.rope.dimension_count", (head_dim,), default=head_dim)
    fields.expect("llama.attention.value_length", (head_dim,), default=head_dim)
    # Without a type, llama.cpp divides by the factor all the same.
    scaling = fields.text("llama.rope.scaling.type", default="linear")
    if scaling not in ("none", "linear"):
        raise ModelLoadError(f"{path}: field llama.rope.scaling.type: {scaling!r} is not supported")
    factor = fields.positive("llama.rope.scaling.factor", default=1.0, or_zero=True)
    linear = None if scaling == "none" or factor in (0.0, 1.0) else RopeScaling(kind="linear", factor=factor)
    ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    architecture = _checked(
        path,
        family="llama",
        has_interleaved_rope=True,
        name=fields.text("general.name", default=path.stem),
        layer_count=fields.integer("llama.block_count", least=1, most=_MOST_LAYERS),
        hidden_size=hidden,
        intermediate_size=fields.integer("llama.feed_forward_length"),
        head_count=heads,
        kv_head_count=fields.integer("llama.attention.head_count_kv", default=heads),
        head_dim=head_dim,
        vocabulary_size=fields.integer("llama.vocab_size", default=metadata.get("tokenizer.ggml.tokens", MISSING)),
        context_token_count=fields.integer("llama.context_length"),
        rope_base=fields.number("llama.rope.freq_base", default=10000.0),
        rope_scaling=linear,
        norm_epsilon=fields.number("llama.attention.layer_norm_rms_epsilon"),
        eos_token_ids=tuple(dict.fromkeys(fields.integer(key) for key in ends if key in metadata)),
        bos_token_id=fields.integer("tokenizer.ggml.bos_token_id", default=None),
    )
    fields.refuse_others(_GGUF_SILENT | {key for key in metadata if not key.startswith("llama.")})
    return architecture


def from_hugging_face(path: Path, config: Mapping[str, object], generation: Mapping[str, object]) -> Architecture:
    """Read config.json and generation_config.json; `path` is the former's, for messages."""
    fields = Fields(path, config)
    fields.expect("model_type", tuple(_FAMILIES))
    name = fields.text("model_type")
    family = _FAMILIES[name]
    fields.expect("architectures", ([family.class_name],), default=[family.class_name])
    for key, values in REQUIRED_VALUES.items():
        if key not in family.unused:
            fields.expect(key, values, default=values[0])
    # `weights.py` reads these two.
    fields.boolean("tie_word_embeddings", default=False)
    fields.integer("num_nextn_predict_layers", default=0, most=_MOST_LAYERS)
    layers = fields.integer("num_hidden_layers", least=1, most=_MOST_LAYERS)
    fields.expect("layer_types", (["full_attention"] * layers,), default=["full_attention"] * layers)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    latent = None if family.latent is None else family.latent(fields)
    if latent is not None:
        for key, size in (("head_dim", latent.rope_size), ("qk_head_dim", latent.key_size)):
            fields.expect(key, (size,), default=size)
    context = fields.integer("max_position_embeddings", default=2048)
    rope = _rope_fields(path, config)
    scaling = _rope_scaling(path, rope, is_deepseek=latent is not None)
    if scaling is not None and scaling.kind == "yarn":
        # Qwen's files keep the length before stretching under this name, DeepSeek's the one after it.
        context = max(context, int(scaling.factor * scaling.original_context_token_count))
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    architecture = _checked(
        path,
        family=name,
        name=str(config.get("_name_or_path") or path.parent.name),
        layer_count=layers,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        head_count=heads,
        kv_head_count=1 if latent is not None else fields.integer("num_key_value_heads", default=heads),
        head_dim=(
            latent.rope_size
            if latent is not None
            else fields.integer("head_dim", default=family.head_dim or hidden // max(heads, 1))
        ),
        vocabulary_size=fields.integer("vocab_size"),
        context_token_count=context,
        rope_base=rope.number("rope_theta", default=10000.0),
        rope_scaling=scaling,
        norm_epsilon=fields.number("rms_norm_eps", default=1e-6),
        eos_token_ids=tuple(eos if isinstance(eos, list) else () if eos is None else (eos,)),
        bos_token_id=fields.integer("bos_token_id", default=None),
        has_qkv_bias=family.has_qkv_bias,
        has_head_norms=family.has_head_norms,
        has_interleaved_rope=latent is not None and fields.boolean("rope_interleave", default=True),
        latent=latent,
        experts=None if family.experts is None else family.experts(fields, layers),
    )
    fields.refuse_others(REQUIRED_VALUES.keys() | SILENT | family.silent)
    rope.refuse_others()
    return architecture


def _rope_fields(path: Path, config: Mapping[str, object]) -> Fields:
    """Older files say rope_scaling, newer ones rope_parameters, which also holds rope_theta."""
    older, newer = (_mapping(config.get(key)) for key in ("rope_scaling", "rope_parameters"))
    if older and newer and {**newer, **older} != newer:
        raise ModelLoadError(f"{path}: fields rope_scaling and rope_parameters say different things")
    beside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    return Fields(path, {**beside, **older, **newer})


def _mapping(found: object) -> dict[str, object]:
    fields = dict(found) if isinstance(found, Mapping) else {} if not found else {"rope_type": found}
    kind = fields.pop("type", None)
    return fields if kind is None else {"rope_type": kind, **fields}


def _rope_scaling(path: Path, fields: Fields, *, is_deepseek: bool) -> RopeScaling | None:
    fields.expect("partial_rotary_factor", (1.0,), default=1.0)
    kind = fields.text("rope_type", default="default")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind=kind, factor=fields.positive("factor"))
    if kind == "llama3":
        low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
        if low >= high:
            raise ModelLoadError(f"{path}: low_freq_factor is {low}, expected less than high_freq_factor ({high})")
        return RopeScaling(
            kind=kind,
            factor=fields.positive("factor"),
            low_frequency_factor=low,
            high_frequency_factor=high,
            original_context_token_count=fields.integer("original_max_position_embeddings", least=1, most=_MOST_TOKENS),
        )
    if kind == "yarn":
        return _yarn(fields, is_deepseek=is_deepseek)
    raise ModelLoadError(f"{path}: rope scaling {kind!r} is not supported (linear, llama3 and yarn are)")


def _yarn(fields: Fields, *, is_deepseek: bool) -> RopeScaling:
    """YaRN (Peng et al., 2023), with the fields that transformers and DeepSeek's own code give it."""
    factor = fields.positive("factor")
    both = [fields.positive(key, default=0.0, or_zero=True) for key in ("mscale", "mscale_all_dim")]
    usual = _yarn_magnitude(factor, both[0]) / _yarn_magnitude(factor, both[1]) if all(both) else None
    if fields.positive("rope_theta", default=10000.0) <= 1.0:
        raise fields.fault("rope_theta", fields.number("rope_theta"))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_token_count=fields.integer("original_max_position_embeddings", least=1, most=_MOST_TOKENS),
        fast_turns=fields.positive("beta_fast", default=32.0),
        slow_turns=fields.positive("beta_slow", default=1.0),
        rounds_dimensions=fields.boolean("truncate", default=True),
        attention_factor=fields.positive("attention_factor", default=usual or _yarn_magnitude(factor, 1.0)),
        softmax_factor=_yarn_magnitude(factor, both[1]) ** 2 if is_deepseek else 1.0,
    )


def _yarn_magnitude(factor: float, scale: float) -> float:
    """By how much cosines and sines grow, for attention over a stretched context to stay as sharp."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


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
    _check_parts(path, architecture)
    if architecture.head_dim % 2:
        raise ModelLoadError(f"{path}: head_dim is {architecture.head_dim}, expected an even number")
    for token in (*architecture.eos_token_ids, architecture.bos_token_id or 0):
        if type(token) is not int or not 0 <= token < architecture.vocabulary_size:
            raise ModelLoadError(
                f"{path}: special token {token!r} is not in the vocabulary of {architecture.vocabulary_size}"
            )
    return architecture


def _check_parts(path: Path, architecture: Architecture) -> None:
    """Refuse sizes of a latent or of experts that do not fit together."""
    experts = architecture.experts
    for part in (architecture.latent, experts):
        for name, value in vars(part).items() if part is not None else ():
            if type(value) in (int, float) and value <= 0 and name != "shared_intermediate_size":
                raise ModelLoadError(f"{path}: {name} is {value}, expected more than 0")
    if experts is None:
        return
    if experts.count % experts.group_count:
        raise ModelLoadError(f"{path}: {experts.count} experts cannot stand in {experts.group_count} equal groups")
    in_group = experts.count // experts.group_count
    if experts.groups_per_row > experts.group_count or experts.group_score_count > in_group:
        raise ModelLoadError(
            f"{path}: {experts.groups_per_row} groups of {experts.group_count}, with {in_group} experts each,"
            f" cannot be chosen by {experts.group_score_count} experts of each"
        )
    if experts.per_row > experts.groups_per_row * in_group:
        raise ModelLoadError(
            f"{path}: {experts.per_row} experts a row cannot be chosen from {experts.groups_per_row * in_group}"
        )


_POSITIVE = (
    "layer_count", "hidden_size", "intermediate_size", "head_count", "kv_head_count", "head_dim",
    "vocabulary_size", "context_token_count", "rope_base", "norm_epsilon",
)  # fmt: skip
