"""Keys and values of all sequences, in blocks, and the attention over them.

Owns the memory of the KV blocks. Invariants: it is allocated once, within `byte_bound`; the block after the last
one that the pool hands out is for padding, and stays zero where torch attends under masks. Whose block is whose it
leaves to the batcher. Paging follows PagedAttention (Kwon et al., SOSP 2023); where no kernel reads blocks where they
lie, those of a group are gathered into one buffer and given to torch's own attention.
"""

import torch
import torch.nn.functional as F

from .architecture import Architecture
from .matmul import Compute
from .step_tensors import AttentionGroup
from .window import FULL, Window


def block_byte_count(architecture: Architecture, block_token_count: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    per_token = architecture.cached_token_size * architecture.layer_count
    return per_token * block_token_count * dtype.itemsize


class KvCache:
    """A layer's blocks are [block_count + 1, block_token_count * cached_token_size].

    Of a token that is its key, then its value; of a latent, whose value is the first part of its key, the key.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        block_count: int,
        block_token_count: int,
        compute: Compute,
        window: Window = FULL,
    ) -> None:
        self.padding_block = block_count
        self._heads = architecture.kv_head_count
        self._key_size, self._value_size = architecture.cached_key_size, architecture.cached_value_size
        self._is_latent = architecture.latent is not None
        self._group_size = architecture.group_size
        self._token_size = architecture.cached_token_size
        self._scale = architecture.softmax_scale
        self._block_token_count = block_token_count
        self._window = window
        self._kernels, self._activations = compute.kernels, compute.activations
        self._attention = compute.attention
        sizes = (self._key_size, self._value_size, compute.dtype)
        self.reads_blocks = self._attention is not None and self._attention.can_attend(*sizes)
        """Whether single rows attend to blocks where they lie; else all are gathered."""
        self.reads_chunks = self._attention is not None and self._attention.can_attend_chunks(*sizes)
        """Whether prompts do, too."""
        dtype, device = compute.dtype, compute.device
        shape = (block_count + 1, block_token_count * self._token_size)
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(architecture.layer_count)]
        self._gathered = torch.empty(0, dtype=dtype, device=device)

    def write(self, layer: int, slots: torch.Tensor, keys_values: torch.Tensor) -> None:
        """Keep what is cached of the rows' tokens: [row_count, cached_token_size] at slots [row_count] int64."""
        cache = self._layers[layer].view(-1, self._token_size)
        cache.index_copy_(0, slots, keys_values.to(cache.dtype))

    def layer(self, layer: int) -> torch.Tensor:
        """A layer's blocks."""
        return self._layers[layer]

    def room(self, row_count: int, head_count: int) -> torch.Tensor:
        """Memory for what a layer's rows attend to, until the next layer's: [row_count, head_count, value size]."""
        shape = (row_count, head_count, self._value_size)
        if self._kernels is not None:
            return self._kernels.room("attended", *shape)
        return torch.empty(shape, dtype=self._activations, device=self._layers[0].device)

    def attend(self, layer: int, queries: torch.Tensor, group: AttentionGroup, out: torch.Tensor) -> None:
        """Attend a group's rows, [row_count, head_count, key size], to their sequences; `out` has the value's size.

        The query heads that share a KV head stand as query rows beneath it: torch's fused CPU kernel
        takes that with a mask, which it does not with `enable_gqa`.
        """
        if group.mask is None:
            self._attend_blocks(layer, queries, group, out)
            return
        count, query_count = group.sequence_count, group.query_count
        keys, values = self._gather(layer, group)
        split = (count, query_count, self._heads, self._group_size, self._key_size)
        under_kv_head = queries.to(keys.dtype).reshape(split).permute(0, 2, 3, 1, 4)
        shape = (count, self._heads, self._group_size * query_count, self._key_size)
        attended = F.scaled_dot_product_attention(
            under_kv_head.reshape(shape), keys, values, attn_mask=group.mask, scale=self._scale
        )
        by_row = attended.view(*under_kv_head.shape[:-1], self._value_size).permute(0, 3, 1, 2, 4)
        out.view(by_row.shape).copy_(by_row)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that hold what is not finite: under a mask a NaN still reaches the next owner."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self._layers[0].device)
        for layer in self._layers:
            layer.index_fill_(0, index, 0)

    def _attend_blocks(self, layer: int, queries: torch.Tensor, group: AttentionGroup, out: torch.Tensor) -> None:
        assert self._attention is not None
        cache = (self._layers[layer], self._token_size, self._block_token_count)
        values_at = 0 if self._is_latent else self._heads * self._key_size
        heads = (self._heads, self._value_size, values_at, self._scale, out)
        if group.lengths is None:
            start = group.longest - group.query_count
            self._attention.attend_chunk(queries, *cache, group.blocks, start, *heads, window=self._window)
        else:
            seen = (group.lengths, group.longest)
            hidden = {"hidden": group.hidden, "sinks": self._window.sinks}
            self._attention.attend(queries, *cache, group.blocks, *seen, *heads, **hidden)

    def _gather(self, layer: int, group: AttentionGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as views of one buffer, [sequences, kv heads, context, size] each."""
        blocks = self._layers[layer]
        size = group.blocks.numel() * blocks.shape[1]
        if self._gathered.numel() < size:
            self._gathered = self._gathered.new_empty(size)
        gathered = self._gathered[:size].view(-1, blocks.shape[1])
        torch.index_select(blocks, 0, group.blocks.flatten(), out=gathered)
        if self._is_latent:
            keys = gathered.view(group.sequence_count, 1, -1, self._key_size)
            return keys, keys[..., : self._value_size]
        shape = (group.sequence_count, -1, 2, self._heads, self._key_size)
        keys, values = gathered.view(shape).permute(2, 0, 3, 1, 4)
        return keys, values
