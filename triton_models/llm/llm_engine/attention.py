"""A layer's attention: rows in, what they attend to out; keys and values go to the cache.

Owns two forms: grouped queries (Ainslie et al., 2023), and DeepSeek's multi-head latent attention
(DeepSeek-V2, 2024), which caches one compressed vector a token for all heads. Invariant: both keep nothing
but weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .architecture import Architecture, Latent
from .cpu_kernels import CpuKernels
from .kv_cache import KvCache
from .matmul import Projection
from .rotary import rotated
from .rowwise import Norm
from .step_tensors import StepTensors

# transformers builds the norms of latents without the config's epsilon, and so were the weights trained.
_LATENT_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Place:
    """Where a layer's rows stand; `tables` are cosines and sines, [context, rope_size / 2] each."""

    layer: int
    step: StepTensors
    tables: tuple[torch.Tensor, torch.Tensor]
    kv_cache: KvCache

    def rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """Turn [row_count, head_count, rope_size] by the rows' positions."""
        cosines, sines = (table[self.step.positions].unsqueeze(1) for table in self.tables)
        return rotated(heads, cosines, sines)

    def attend(self, queries: torch.Tensor) -> torch.Tensor:
        """[row_count, head_count, key_size] to [row_count, head_count * value_size]."""
        out = self.kv_cache.room(*queries.shape[:2])
        for group in self.step.groups:
            self.kv_cache.attend(self.layer, queries, group, out)
        return out.flatten(1)


class GroupedQueryAttention:
    """Query heads share fewer key and value heads."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, torch.Tensor],
        norm: Norm,
        qkv: Projection,
        kernels: CpuKernels | None,
    ) -> None:
        self._architecture = a = architecture
        self.norm, self.qkv, self._kernels = norm, qkv, kernels
        self.head_norms: torch.Tensor | None = None
        if a.has_head_norms:
            of_each = [weights["query_norm"]] * a.head_count + [weights["key_norm"]] * a.kv_head_count
            self.head_norms = torch.stack(of_each)

    def __call__(self, rows: torch.Tensor, place: Place) -> torch.Tensor:
        """[row_count, hidden_size], which are normed first, to [row_count, query_size]."""
        a = self._architecture
        qkv = self.qkv(rows, before=self.norm)
        if self._kernels is not None:
            # A product by torch may be a transposed view.
            qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
            kv_cache, step = place.kv_cache, place.step
            self._kernels.rotate_and_write(
                qkv, a.head_count, place.tables, step, self.head_norms, a.norm_epsilon,
                kv_cache.layer(place.layer), kv_cache.layout,
            )  # fmt: skip
            return place.attend(qkv[:, : a.query_size].unflatten(1, (a.head_count, a.head_dim)))
        by_head = qkv.reshape(rows.shape[0], -1, a.head_dim)
        queries_keys, values = by_head.split((a.head_count + a.kv_head_count, a.kv_head_count), dim=1)
        if self.head_norms is not None:
            queries_keys = F.rms_norm(queries_keys, (a.head_dim,), eps=a.norm_epsilon) * self.head_norms
        turned = place.rotated(queries_keys)
        queries, keys = turned.split((a.head_count, a.kv_head_count), dim=1)
        place.kv_cache.write(place.layer, place.step.slots, torch.cat((keys, values), dim=1).flatten(1))
        return place.attend(queries)


class LatentAttention:
    """All heads read one compressed vector a token; expanding it to keys and values is folded into the queries and
    into what was attended to, so that nothing of a context is expanded (the "absorbed" form)."""

    def __init__(
        self,
        architecture: Architecture,
        latent: Latent,
        weights: Mapping[str, torch.Tensor],
        norm: Norm,
        latents: Projection,
        query: Projection | None,
    ) -> None:
        self._latent, self._heads = latent, architecture.head_count
        self._norm, self._latents, self._query = norm, latents, query
        self._kv_norm = Norm(weights["kv_latent_norm"], _LATENT_NORM_EPSILON)
        self._query_norm = None if query is None else Norm(weights["query_latent_norm"], _LATENT_NORM_EPSILON)
        expanding = weights["keys_values"].view(self._heads, -1, latent.kv_rank)
        self._to_keys, self._to_values = expanding.split((latent.nope_size, latent.value_size), dim=1)

    def __call__(self, rows: torch.Tensor, place: Place) -> torch.Tensor:
        """[row_count, hidden_size], which are normed first, to [row_count, head_count * value_size]."""
        latent = self._latent
        compressed = self._latents(rows, before=self._norm)
        sizes = (compressed.shape[1] - latent.kv_rank - latent.rope_size, latent.kv_rank, latent.rope_size)
        queries, kv, shared_key = compressed.split(sizes, dim=1)
        if self._query is not None:
            queries = self._query(queries, before=self._query_norm)
        kv = self._kv_norm(kv)
        by_head = queries.reshape(rows.shape[0], self._heads, latent.key_size)
        plain, turning = by_head.split((latent.nope_size, latent.rope_size), dim=2)
        shared_key = place.rotated(shared_key.unsqueeze(1)).squeeze(1)
        place.kv_cache.write(place.layer, place.step.slots, torch.cat((kv, shared_key), dim=1))
        absorbed = torch.einsum("rhn,hnc->rhc", plain, self._to_keys)
        turned = place.rotated(turning)
        attended = place.attend(torch.cat((absorbed, turned), dim=2)).view(rows.shape[0], self._heads, -1)
        return torch.einsum("rhc,hvc->rhv", attended, self._to_values).flatten(1)
