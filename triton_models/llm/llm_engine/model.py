"""The model: one step's rows in, logits out.

Owns the weights and the rotary tables. Invariants: it keeps nothing between steps but what it writes
into the KV cache; a row depends on its own sequence alone. A layer is that of Llama (Touvron et al.,
2023): RMSNorm, attention, RMSNorm, feed-forward; what these two are is `attention.py`'s and `mlp.py`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .architecture import Architecture
from .attention import GroupedQueryAttention, LatentAttention, Place
from .blocks import Blocks
from .division import Division
from .kv_cache import KvCache
from .matmul import Compute, Embedding, Projection
from .mlp import ExpertMixture, Mlp
from .ranks import Alone, Group
from .rotary import rotary_tables
from .rowwise import Norm
from .step_tensors import StepTensors


@dataclass(frozen=True)
class _Layer:
    attention: GroupedQueryAttention | LatentAttention
    attention_output: Projection
    mlp_norm: Norm
    mlp: Mlp | ExpertMixture


class Model:
    """One rank's weights in the compute type on the device, ready to run."""

    def __init__(
        self,
        architecture: Architecture,
        tensors: dict[str, torch.Tensor | Blocks],
        here: Division,
        ranks: Alone | Group,
        *,
        context_token_count: int,
        compute: Compute,
    ) -> None:
        self.architecture = architecture
        self._here, self._ranks, self._compute = here, ranks, compute
        weights = _Weights(tensors, compute)
        local = here.local(architecture)
        self._layers = [_layer(local, here, layer, weights) for layer in range(architecture.layer_count)]
        self._final_norm = weights.norm("final_norm", architecture)
        self._output = weights.projection("output" if "output" in tensors else "embedding")
        self._embedding = Embedding(tensors["embedding"], compute)
        self._tables = rotary_tables(architecture, context_token_count, compute.activations, compute.device)

    @torch.inference_mode()
    def forward(
        self, step: StepTensors, kv_cache: KvCache, *, give_up: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Compute a step's rows; gives the logits of its sampled rows, [sampled_count, vocabulary] fp32.

        `give_up` is asked before each layer; None is the answer of a step that was given up. Of several ranks only
        the first gets all logits, and the others must be given the same step.
        """
        hidden = self._embedded(step.token_ids)
        # In place: fresh memory for each sum costs a prefill more than the arithmetic.
        onto = hidden if self._ranks.size == 1 else None
        for index, layer in enumerate(self._layers):
            if give_up():
                return None
            place = Place(index, step, self._tables, kv_cache)
            part = layer.attention_output(layer.attention(hidden, place), onto=onto)
            if onto is None:
                hidden += self._ranks.add_up(part)
            part = layer.mlp(hidden, norm=layer.mlp_norm, onto=onto)
            if onto is None:
                hidden += self._ranks.add_up(part)
        wanted = hidden.index_select(0, step.sample_rows)
        return self._ranks.joined(self._output(wanted, before=self._final_norm).float().contiguous())

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[row_count, hidden_size]; a rank looks up what it has of the vocabulary, and the sum is everything."""
        if self._ranks.size == 1:
            return self._embedding(token_ids)
        places = token_ids - self._here.vocabulary.start
        is_here = (places >= 0) & (places < len(self._embedding))
        found = self._embedding(torch.where(is_here, places, 0))
        return self._ranks.add_up(found.masked_fill_(~is_here.unsqueeze(1), 0))


@dataclass(frozen=True)
class _Weights:
    """The fused tensors of `layouts.py`, brought to the device as they are asked for."""

    tensors: dict[str, torch.Tensor | Blocks]
    compute: Compute
    prefix: str = ""

    def of(self, layer: int) -> "_Weights":
        """Those of one layer, by their names without it."""
        return _Weights(self.tensors, self.compute, f"layers.{layer}.")

    def has(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def tensor(self, name: str) -> torch.Tensor:
        """In the type of activations."""
        return self._dense(name).to(self.compute.device, self.compute.activations)

    def norm(self, name: str, architecture: Architecture) -> Norm:
        return Norm(self.tensor(name), architecture.norm_epsilon)

    def exact(self, name: str) -> torch.Tensor:
        """In the type that it was loaded in."""
        return self._dense(name).to(self.compute.device)

    def named(self, *names: str) -> dict[str, torch.Tensor]:
        """Those that the model has of `names`."""
        return {name: self.tensor(name) for name in names if self.has(name)}

    def projection(self, name: str, *, room: str | None = None) -> Projection:
        bias = self._dense(f"{name}_bias") if self.has(f"{name}_bias") else None
        return Projection(self.tensors[self.prefix + name], self.compute, bias=bias, room=room)

    def projections(self, name: str, count: int, *, room: str | None = None) -> list[Projection]:
        """Of a tensor that is `count` matrices of the same size, one below the other."""
        whole = self.tensors[self.prefix + name]
        size = whole.shape[0] // count
        spans = [slice(first, first + size) for first in range(0, whole.shape[0], size)]
        parts = [whole.rows(span) if isinstance(whole, Blocks) else whole[span] for span in spans]
        return [Projection(part, self.compute, room=room) for part in parts]

    def mlp(self, kind: str = "") -> Mlp:
        return Mlp(self.projection(f"{kind}gate_up", room="gate_up"), self.projection(f"{kind}down"))

    def _dense(self, name: str) -> torch.Tensor:
        found = self.tensors[self.prefix + name]
        return found.dense() if isinstance(found, Blocks) else found


def _layer(architecture: Architecture, division: Division, index: int, weights: _Weights) -> _Layer:
    here = weights.of(index)
    return _Layer(
        attention=_attention(architecture, here),
        attention_output=here.projection("attention_output"),
        mlp_norm=here.norm("mlp_norm", architecture),
        mlp=_mixture(architecture, division, here) if here.has("router") else here.mlp(),
    )


def _attention(architecture: Architecture, here: _Weights) -> GroupedQueryAttention | LatentAttention:
    norm = here.norm("attention_norm", architecture)
    if architecture.latent is None:
        norms = here.named("query_norm", "key_norm")
        return GroupedQueryAttention(
            architecture, norms, norm, here.projection("qkv", room="qkv"), here.compute.kernels
        )
    return LatentAttention(
        architecture,
        architecture.latent,
        here.named("query_latent_norm", "kv_latent_norm", "keys_values"),
        norm,
        here.projection("latents"),
        here.projection("query") if here.has("query") else None,
    )


def _mixture(architecture: Architecture, division: Division, here: _Weights) -> ExpertMixture:
    assert architecture.experts is not None
    return ExpertMixture(
        architecture.experts,
        router=here.tensor("router"),
        choice_bias=here.exact("router_bias") if here.has("router_bias") else None,
        experts_here=_expert_mlps(here, len(division.experts)),
        shared=here.mlp("shared_") if here.has("shared_down") else None,
        here=division.experts,
    )


def _expert_mlps(here: _Weights, count: int) -> list[Mlp]:
    gate_ups = here.projections("experts_gate_up", count, room="gate_up")
    both = zip(gate_ups, here.projections("experts_down", count), strict=True)
    return [Mlp(gate_up, down) for gate_up, down in both]
