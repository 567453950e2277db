"""Which tensors a model is made of: their fused names here, their parts' names and shapes in Hugging Face's files.

Owns the table of names. Invariants: every tensor of the mathematics stands in it once; nothing is read
here. What is fused is multiplied at once: q, k and v; gate and up; all experts of a layer. A tensor's cut
says how ranks divide it: what is cut by rows gives each rank some outputs, what is cut by columns gives each
a part of every sum.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .architecture import Architecture, Experts, Latent


@dataclass(frozen=True)
class RopeRows:
    """Rows that are turned by their positions: of each `head_size` rows the last `rope_size`."""

    head_size: int
    rope_size: int


@dataclass(frozen=True)
class Cut:
    """How a tensor is divided among ranks: along which axis, and by what. A unit is never torn apart."""

    axis: int
    by: str
    """query heads, kv heads, or evenly."""
    unit: int = 1
    """Rows or columns of one head."""


_ROWS, _COLUMNS = Cut(0, "evenly"), Cut(1, "evenly")


@dataclass(frozen=True)
class Part:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    rope: RopeRows | None = None
    cut: Cut | None = None
    """None: all ranks hold all of it."""
    expert: int | None = None
    """Whose it is; only the rank that has this expert holds it."""


@dataclass(frozen=True)
class Fused:
    """One tensor of the engine: its parts, joined along their rows."""

    name: str
    parts: tuple[Part, ...]
    is_exact: bool = False
    """It stays in fp32, whatever type the weights have."""
    can_be_rounded: bool = True
    """To eight bits, where it is a matrix; what chooses experts, and what stands between two products, is not."""


def fused_tensors(architecture: Architecture, *, tied: bool) -> list[Fused]:
    """All tensors of a model; a tied one has no output matrix."""
    a = architecture
    fused = [_single("embedding", "model.embed_tokens.weight", a.vocabulary_size, a.hidden_size, cut=_ROWS)]
    for layer in range(a.layer_count):
        fused += _layer(a, layer)
    fused.append(_single("final_norm", "model.norm.weight", a.hidden_size))
    if not tied:
        fused.append(_single("output", "lm_head.weight", a.vocabulary_size, a.hidden_size, cut=_ROWS))
    return fused


def parameter_count(architecture: Architecture, *, tied: bool) -> int:
    """Numbers in all tensors of a model."""
    return sum(math.prod(part.shape) for fused in fused_tensors(architecture, tied=tied) for part in fused.parts)


def _single(name: str, part: str, *shape: int, cut: Cut | None = None, can_be_rounded: bool = True) -> Fused:
    return Fused(name, (Part(part, shape, cut=cut),), can_be_rounded=can_be_rounded)


def _layer(a: Architecture, layer: int) -> Iterator[Fused]:
    here, there = f"layers.{layer}.{{}}".format, f"model.layers.{layer}.{{}}".format
    yield _single(here("attention_norm"), there("input_layernorm.weight"), a.hidden_size)
    if a.latent is None:
        yield from _grouped_query(a, here, there)
    else:
        yield from _latent(a, a.latent, here, there)
    yield _single(here("mlp_norm"), there("post_attention_layernorm.weight"), a.hidden_size)
    if a.experts is None or not a.experts.are_in(layer):
        yield from _mlp(here(""), there("mlp."), a.intermediate_size, a.hidden_size)
    else:
        yield from _experts(a.experts, a.hidden_size, here, there)


def _grouped_query(a: Architecture, here: Callable[[str], str], there: Callable[[str], str]) -> Iterator[Fused]:
    rope = RopeRows(a.head_dim, a.head_dim)
    of_query, of_kv = Cut(0, "query heads", a.head_dim), Cut(0, "kv heads", a.head_dim)
    sizes = (("q", a.query_size, rope, of_query), ("k", a.kv_size, rope, of_kv), ("v", a.kv_size, None, of_kv))

    def parts(ending: str, *columns: int) -> tuple[Part, ...]:
        return tuple(
            Part(there(f"self_attn.{letter}_proj.{ending}"), (rows, *columns), turned, cut)
            for letter, rows, turned, cut in sizes
        )

    yield Fused(here("qkv"), parts("weight", a.hidden_size))
    if a.has_qkv_bias:
        yield Fused(here("qkv_bias"), parts("bias"))
    if a.has_head_norms:
        yield _single(here("query_norm"), there("self_attn.q_norm.weight"), a.head_dim)
        yield _single(here("key_norm"), there("self_attn.k_norm.weight"), a.head_dim)
    cut = Cut(1, "query heads", a.head_dim)
    yield _single(here("attention_output"), there("self_attn.o_proj.weight"), a.hidden_size, a.query_size, cut=cut)


def _latent(
    a: Architecture, latent: Latent, here: Callable[[str], str], there: Callable[[str], str]
) -> Iterator[Fused]:
    """Multi-head latent attention: what is compressed is computed at once, then each is expanded."""
    query_size = a.head_count * latent.key_size
    query_rope, query_cut = RopeRows(latent.key_size, latent.rope_size), Cut(0, "query heads", latent.key_size)
    compressed_size = latent.kv_rank + latent.rope_size
    compressed = Part(
        there("self_attn.kv_a_proj_with_mqa.weight"),
        (compressed_size, a.hidden_size),
        RopeRows(compressed_size, latent.rope_size),
    )
    if latent.query_rank is None:
        queries = Part(there("self_attn.q_proj.weight"), (query_size, a.hidden_size), query_rope, query_cut)
        yield Fused(here("latents"), (queries, compressed))
    else:
        queries = Part(there("self_attn.q_a_proj.weight"), (latent.query_rank, a.hidden_size))
        yield Fused(here("latents"), (queries, compressed))
        yield _single(here("query_latent_norm"), there("self_attn.q_a_layernorm.weight"), latent.query_rank)
        expanded = Part(there("self_attn.q_b_proj.weight"), (query_size, latent.query_rank), query_rope, query_cut)
        yield Fused(here("query"), (expanded,))
    yield _single(here("kv_latent_norm"), there("self_attn.kv_a_layernorm.weight"), latent.kv_rank)
    of_head = latent.nope_size + latent.value_size
    shape, cut = (a.head_count * of_head, latent.kv_rank), Cut(0, "query heads", of_head)
    yield _single(here("keys_values"), there("self_attn.kv_b_proj.weight"), *shape, cut=cut, can_be_rounded=False)
    shape, cut = (a.hidden_size, a.head_count * latent.value_size), Cut(1, "query heads", latent.value_size)
    yield _single(here("attention_output"), there("self_attn.o_proj.weight"), *shape, cut=cut)


def _mlp(here: str, there: str, size: int, hidden_size: int) -> Iterator[Fused]:
    parts = tuple(Part(f"{there}{name}_proj.weight", (size, hidden_size), cut=_ROWS) for name in ("gate", "up"))
    yield Fused(f"{here}gate_up", parts)
    yield _single(f"{here}down", f"{there}down_proj.weight", hidden_size, size, cut=_COLUMNS)


def _experts(
    experts: Experts, hidden_size: int, here: Callable[[str], str], there: Callable[[str], str]
) -> Iterator[Fused]:
    yield _single(here("router"), there("mlp.gate.weight"), experts.count, hidden_size, can_be_rounded=False)
    if experts.has_choice_bias:
        bias = Part(there("mlp.gate.e_score_correction_bias"), (experts.count,))
        yield Fused(here("router_bias"), (bias,), is_exact=True)
    gate_up, down = [], []
    size = experts.intermediate_size
    for expert in range(experts.count):
        name = there(f"mlp.experts.{expert}.{{}}_proj.weight").format
        gate_up += [Part(name(part), (size, hidden_size), expert=expert) for part in ("gate", "up")]
        down.append(Part(name("down"), (hidden_size, size), expert=expert))
    yield Fused(here("experts_gate_up"), tuple(gate_up))
    yield Fused(here("experts_down"), tuple(down))
    if experts.shared_intermediate_size:
        shared = experts.shared_intermediate_size
        yield from _mlp(here("shared_"), there("mlp.shared_experts."), shared, hidden_size)
