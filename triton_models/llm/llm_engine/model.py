"""The model: one step's rows in, logits out.

Owns the weights and the rotary tables. Invariants: it keeps nothing between steps but what it writes
into the KV cache; a row depends on its own sequence alone. The architecture is that of Llama (Touvron
et al., 2023): RMSNorm, rotary positions (Su et al., 2021) in the half-split order, grouped-query
attention (Ainslie et al., 2023), SwiGLU; with a bias on q, k and v for Qwen2, and norms on the heads of
q and k for Qwen3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .architecture import Architecture, RopeScaling
from .kv_cache import KvCache
from .matmul import Projection
from .step_tensors import StepTensors


@dataclass(frozen=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: Projection
    head_norms: torch.Tensor | None
    """[head_count + kv_head_count, head_dim]: of the queries' heads, then of the keys'."""
    attention_output: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    down: Projection


class Model:
    """Weights in the compute type on the device, ready to run."""

    def __init__(
        self,
        architecture: Architecture,
        tensors: dict[str, torch.Tensor],
        *,
        context_token_count: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.architecture = architecture

        def vector(name: str) -> torch.Tensor:
            return tensors[name].to(device, dtype)

        def projection(name: str) -> Projection:
            return Projection(tensors[name], dtype, device, bias=tensors.get(f"{name}_bias"))

        def head_norms(layer: int) -> torch.Tensor | None:
            if not architecture.has_head_norms:
                return None
            query, key = vector(f"layers.{layer}.query_norm"), vector(f"layers.{layer}.key_norm")
            return torch.stack([query] * architecture.head_count + [key] * architecture.kv_head_count)

        self._layers = [
            _Layer(
                attention_norm=vector(f"layers.{layer}.attention_norm"),
                qkv=projection(f"layers.{layer}.qkv"),
                head_norms=head_norms(layer),
                attention_output=projection(f"layers.{layer}.attention_output"),
                mlp_norm=vector(f"layers.{layer}.mlp_norm"),
                gate_up=projection(f"layers.{layer}.gate_up"),
                down=projection(f"layers.{layer}.down"),
            )
            for layer in range(architecture.layer_count)
        ]
        self._final_norm = vector("final_norm")
        self._output = projection("output" if "output" in tensors else "embedding")
        self._embedding = vector("embedding") if "output" in tensors else self._output.weight
        self._cosines, self._sines = rotary_tables(architecture, context_token_count, dtype, device)

    @torch.inference_mode()
    def forward(
        self, step: StepTensors, kv_cache: KvCache, *, give_up: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Compute a step's rows; gives the logits of its sampled rows, [sampled_count, vocabulary] fp32.

        `give_up` is asked before each layer; None is the answer of a step that was given up.
        """
        hidden = F.embedding(step.token_ids, self._embedding)
        cosines = self._cosines[step.positions].unsqueeze(1)
        sines = self._sines[step.positions].unsqueeze(1)
        for index, layer in enumerate(self._layers):
            if give_up():
                return None
            normed = self._norm(hidden, layer.attention_norm)
            attended = self._attention(index, layer.qkv(normed), cosines, sines, step, kv_cache)
            # In place: fresh memory for each of these costs a prefill more than the arithmetic.
            hidden += layer.attention_output(attended)
            gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden += layer.down(F.silu(gate, inplace=True).mul_(up))
        wanted = hidden.index_select(0, step.sample_rows)
        return self._output(self._norm(wanted, self._final_norm)).float().contiguous()

    def _attention(
        self,
        layer: int,
        qkv: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        step: StepTensors,
        kv_cache: KvCache,
    ) -> torch.Tensor:
        """[row_count, query_size + 2 * kv_size] to [row_count, query_size]."""
        a = self.architecture
        by_head = qkv.reshape(qkv.shape[0], -1, a.head_dim)
        queries_keys, norms = by_head[:, : -a.kv_head_count], self._layers[layer].head_norms
        if norms is not None:
            queries_keys = F.rms_norm(queries_keys, (a.head_dim,), eps=a.norm_epsilon) * norms
        turned = rotated(queries_keys, cosines, sines)
        queries, keys = turned.split((a.head_count, a.kv_head_count), dim=1)
        values = by_head[:, -a.kv_head_count :]
        kv_cache.write(layer, step.slots, torch.cat((keys, values), dim=1).flatten(1))
        parts = [kv_cache.attend(layer, queries[group.rows], group) for group in step.groups]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (Zhang and Sennrich, 2019) of rows [row_count, hidden_size]; torch sums in fp32."""
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.architecture.norm_epsilon)


def rotated(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn [row_count, head_count, head_dim] by its positions; cosines and sines [row_count, 1, head_dim / 2]."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def rotary_tables(
    architecture: Architecture, context_token_count: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [context_token_count, head_dim / 2] each, computed in fp32."""
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
    frequencies = 1.0 / architecture.rope_base**exponents
    magnitude = 1.0
    if architecture.rope_scaling is not None:
        frequencies = _scaled(frequencies, architecture.rope_scaling, architecture.rope_base)
        magnitude = architecture.rope_scaling.attention_factor
    angles = torch.outer(torch.arange(context_token_count).float(), frequencies)
    return (angles.cos() * magnitude).to(device, dtype), (angles.sin() * magnitude).to(device, dtype)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling, base: float) -> torch.Tensor:
    """Stretch rotary frequencies: all alike, or as Llama 3.1 and YaRN do, the slow ones only."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        kept = _yarn_kept(len(frequencies), scaling, base)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor
    assert scaling.kind == "llama3"
    turns = scaling.original_context_token_count * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn_kept(count: int, scaling: RopeScaling, base: float) -> torch.Tensor:
    """Which share of each of `count` frequencies stays: all of those that turn often within the original context."""

    def dimension(turns: float) -> float:
        """The pair that turns so often within the original context."""
        wavelength = scaling.original_context_token_count / (turns * 2 * math.pi)
        return 2 * count * math.log(wavelength) / (2 * math.log(base))

    first, last = dimension(scaling.fast_turns), dimension(scaling.slow_turns)
    if scaling.rounds_dimensions:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    ramp = (torch.arange(count).float() - first) / max(last - first, 0.001)
    return 1 - ramp.clamp(0, 1)
