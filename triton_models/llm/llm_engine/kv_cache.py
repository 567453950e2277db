"""Keys and values of all sequences, in blocks, and the attention over them.

Owns the memory of the KV blocks. Invariants: it is allocated once, within `byte_bound`; the block after the last
one that the pool hands out is for padding, and stays zero where torch attends under masks. Whose block is whose it
leaves to the batcher. Paging follows PagedAttention (Kwon et al., SOSP 2023); where no kernel reads blocks where they
lie, those of a group are gathered into one buffer and given to torch's own attention.
"""

import torch
import torch.nn.functional as F

from .architecture import Architecture
from .cache_layout import cache_layout
from .matmul import Compute
from .step_tensors import AttentionGroup
from .window import FULL, Window


class KvCache:
    """A layer's blocks are [block_count + 1, block_token_count * token_size], as `layout` says."""

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
        self.layout = layout = cache_layout(architecture, block_token_count, compute.cached)
        self._group_size = architecture.group_size
        self.window = window
        self._kernels, self._activations = compute.kernels, compute.activations
        self._attention = compute.attention
        self.reads_blocks = self._attention is not None and self._attention.can_attend(layout)
        """Whether single rows attend to blocks where they lie; else all are gathered."""
        self.reads_chunks = self._attention is not None and self._attention.can_attend_chunks(layout)
        """Whether prompts do, too."""
        dtype, device = layout.dtype, compute.device
        shape = (block_count + 1, block_token_count * layout.token_size)
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(architecture.layer_count)]
        self._gathered = torch.empty(0, dtype=dtype, device=device)

    def write(self, layer: int, slots: torch.Tensor, keys_values: torch.Tensor) -> None:
        """Keep what is cached of the rows' tokens: [row_count, token_size] at slots [row_count] int64."""
        cache = self._layers[layer].view(-1, self.layout.token_size)
        cache.index_copy_(0, slots, keys_values.to(cache.dtype))

    def layer(self, layer: int) -> torch.Tensor:
        """A layer's blocks."""
        return self._layers[layer]

    def room(self, row_count: int, head_count: int) -> torch.Tensor:
        """Memory for what a layer's rows attend to, until the next layer's: [row_count, head_count, value size]."""
        shape = (row_count, head_count, self.layout.value_size)
        if self._kernels is not None:
            return self._kernels.room("attended", *shape)
        return torch.empty(shape, dtype=self._activations, device=self._layers[0].device)

    def attend(self, layer: int, queries: torch.Tensor, group: AttentionGroup, out: torch.Tensor) -> None:
        """Attend a group's rows of [row_count, head_count, key size] to their sequences; `out` has the value's size.

        The query heads that share a KV head stand as query rows beneath it: torch's fused CPU kernel
        takes that with a mask, which it does not with `enable_gqa`.
        """
        if group.mask is None:
            assert self._attention is not None
            self._attention.attend(queries, self._layers[layer], self.layout, group, self.window, out)
            return
        layout, count, query_count = self.layout, group.sequence_count, group.query_count
        queries, out = queries[group.rows], out[group.rows]
        keys, values = self._gather(layer, group)
        split = (count, query_count, layout.kv_head_count, self._group_size, layout.key_size)
        under_kv_head = queries.to(keys.dtype).reshape(split).permute(0, 2, 3, 1, 4)
        shape = (count, layout.kv_head_count, self._group_size * query_count, layout.key_size)
        attended = F.scaled_dot_product_attention(
            under_kv_head.reshape(shape), keys, values, attn_mask=group.mask, scale=layout.scale
        )
        by_row = attended.view(*under_kv_head.shape[:-1], layout.value_size).permute(0, 3, 1, 2, 4)
        out.view(by_row.shape).copy_(by_row)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that hold what is not finite: under a mask a NaN still reaches the next owner."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self._layers[0].device)
        for layer in self._layers:
            layer.index_fill_(0, index, 0)

    def _gather(self, layer: int, group: AttentionGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as views of one buffer, [sequences, kv heads, context, size] each."""
        blocks = self._layers[layer]
        size = group.blocks.numel() * blocks.shape[1]
        if self._gathered.numel() < size:
            self._gathered = self._gathered.new_empty(size)
        gathered = self._gathered[:size].view(-1, blocks.shape[1])
        torch.index_select(blocks, 0, group.blocks.flatten(), out=gathered)
        layout = self.layout
        if layout.is_latent:
            keys = gathered.view(group.sequence_count, 1, -1, layout.key_size)
            return keys, keys[..., : layout.value_size]
        shape = (group.sequence_count, -1, 2, layout.kv_head_count, layout.key_size)
        keys, values = gathered.view(shape).permute(2, 0, 3, 1, 4)
        return keys, values
