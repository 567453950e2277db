"""The model: one step's rows in, logits out.

Owns the weights and the rotary tables. Invariants: it keeps nothing between steps but what it writes
into the KV cache; a row depends on its own sequence alone. A layer is that of Llama (Touvron et al.,
2023): RMSNorm, attention, RMSNorm, feed-forward; what these two are is `attention.py`'s and `mlp.py`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from .architecture import Architecture
from .attention import GroupedQueryAttention, LatentAttention, Place
from .blocks import Floats8, Weight
from .cpu_kernels import Layers, LayerWeights, layers_of
from .division import Division
from .kv_cache import KvCache
from .matmul import Compute, Embedding, Projection
from .mlp import EachExpert, ExpertMixture, Mlp
from .ranks import Alone, Group
from .rotary import rotary_tables
from .rowwise import Norm
from .step_tensors import StepTensors

if TYPE_CHECKING:
    from .gpu_products import GpuExperts

# A step of so many is short: nobody asks between its layers whether it is still wanted.
_FEW_ROWS = 64


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
        tensors: dict[str, Weight],
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
        self._cpu_layers = _cpu_layers(self._layers) if ranks.size == 1 and compute.kernels is not None else None
        self._final_norm = weights.norm("final_norm", architecture)
        self._output = weights.projection("output" if "output" in tensors else "embedding")
        self._embedding = Embedding(tensors["embedding"], compute)
        self._tables = rotary_tables(architecture, context_token_count, compute.activations, compute.device)

    @torch.inference_mode()
    def forward(
        self, step: StepTensors, kv_cache: KvCache, *, give_up: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Compute a step's rows; gives the logits of its sampled rows, [sampled_count, vocabulary] fp32.

        `give_up` is asked before each layer, of a few rows once; None is the answer of a step that was given up. Of
        several ranks only the first gets all logits, and the others must be given the same step.
        """
        hidden = self._embedded(step.token_ids)
        count = len(self._layers)
        at_once = 1 if len(hidden) > _FEW_ROWS else count
        for first in range(0, count, at_once):
            if give_up():
                return None
            self._run_layers(range(first, first + at_once), hidden, step, kv_cache)
        wanted = hidden.index_select(0, step.sample_rows)
        return self._ranks.joined(self._output(wanted, before=self._final_norm).float().contiguous())

    def _run_layers(self, span: range, hidden: torch.Tensor, step: StepTensors, kv_cache: KvCache) -> None:
        """Consecutive layers, [row_count, hidden_size] in place: fresh memory for each sum costs a prefill more than
        the arithmetic."""
        kernels, a = self._compute.kernels, self.architecture
        if kernels is not None and self._cpu_layers is not None and all(group.mask is None for group in step.groups):
            kernels.run_layers(
                self._cpu_layers, span, hidden, a.head_count, a.norm_epsilon, self._tables, step, kv_cache,
                self._compute.narrowness,
            )  # fmt: skip
            return
        for index in span:
            layer = self._layers[index]
            attended = layer.attention(hidden, Place(index, step, self._tables, kv_cache))
            self._add(hidden, partial(layer.attention_output, attended))
            self._add(hidden, partial(layer.mlp, hidden, norm=layer.mlp_norm))

    def _add(self, hidden: torch.Tensor, product: Callable[..., torch.Tensor]) -> None:
        """Add what all ranks' products give."""
        if self._ranks.size == 1:
            product(onto=hidden)
        else:
            hidden += self._ranks.add_up(product())

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

    tensors: dict[str, Weight]
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
        parts = [whole[span] if isinstance(whole, torch.Tensor) else whole.rows(span) for span in spans]
        return [Projection(part, self.compute, room=room) for part in parts]

    def whole(self, name: str) -> torch.Tensor | Floats8:
        """A tensor on the device, in the type of products where it is none of eight-bit floats."""
        found = self.tensors[self.prefix + name]
        if isinstance(found, Floats8):
            return found.to(self.compute.device)
        return self._dense(name).to(self.compute.device, self.compute.dtype)

    def mlp(self, kind: str = "") -> Mlp:
        return Mlp(self.projection(f"{kind}gate_up", room="gate_up"), self.projection(f"{kind}down"))

    def _dense(self, name: str) -> torch.Tensor:
        found = self.tensors[self.prefix + name]
        return found if isinstance(found, torch.Tensor) else found.dense()


def _layer(architecture: Architecture, division: Division, index: int, weights: _Weights) -> _Layer:
    here = weights.of(index)
    return _Layer(
        attention=_attention(architecture, here),
        attention_output=here.projection("attention_output"),
        mlp_norm=here.norm("mlp_norm", architecture),
        mlp=_mixture(architecture, division, here) if here.has("router") else here.mlp(),
    )


def _cpu_layers(layers: list[_Layer]) -> Layers | None:
    """The layers as the kernels take them; None where something of them is not theirs."""
    found = []
    for layer in layers:
        attention, mlp = layer.attention, layer.mlp
        if not isinstance(attention, GroupedQueryAttention) or not isinstance(mlp, Mlp):
            return None
        qkv, output, gate_up, down = (
            product.packed for product in (attention.qkv, layer.attention_output, mlp.gate_up, mlp.down)
        )
        if qkv is None or output is None or gate_up is None or down is None:
            return None
        norms = (attention.norm, layer.mlp_norm, attention.head_norms)
        found.append(LayerWeights(*norms, qkv=qkv, output=output, gate_up=gate_up, down=down))
    return layers_of(found)


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
    own = division.experts
    grouped = here.compute.grouped_experts
    routed: EachExpert | GpuExperts
    if grouped is None or not own:
        routed = EachExpert(_expert_mlps(here, len(own)), own)
    else:
        routed = grouped(here.whole("experts_gate_up"), here.whole("experts_down"), own)
    return ExpertMixture(
        architecture.experts,
        router=here.tensor("router"),
        choice_bias=here.exact("router_bias") if here.has("router_bias") else None,
        routed=routed,
        shared=here.mlp("shared_") if here.has("shared_down") else None,
    )


def _expert_mlps(here: _Weights, count: int) -> list[Mlp]:
    gate_ups = here.projections("experts_gate_up", count, room="gate_up")
    both = zip(gate_ups, here.projections("experts_down", count), strict=True)
    return [Mlp(gate_up, down) for gate_up, down in both]
