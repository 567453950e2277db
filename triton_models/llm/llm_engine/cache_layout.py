"""How keys and values lie in a layer's blocks. Pure."""

from dataclasses import dataclass

import torch

from .architecture import Architecture


@dataclass(frozen=True)
class CacheLayout:
    """Of a token, the keys of all KV heads, then their values; of a latent, whose value is the first part of its key,
    the key."""

    dtype: torch.dtype
    block_token_count: int
    kv_head_count: int
    key_size: int
    value_size: int
    is_latent: bool
    scale: float
    """Of the products of queries and keys."""

    @property
    def token_size(self) -> int:
        """Numbers of a token."""
        return self.key_size if self.is_latent else self.kv_head_count * (self.key_size + self.value_size)

    @property
    def values_at(self) -> int:
        """Where a token's values begin."""
        return 0 if self.is_latent else self.kv_head_count * self.key_size

    @property
    def block_byte_count(self) -> int:
        """Bytes of a block in one layer."""
        return self.token_size * self.block_token_count * self.dtype.itemsize


def cache_layout(architecture: Architecture, block_token_count: int, dtype: torch.dtype) -> CacheLayout:
    """That of a model, or of what one rank has of it."""
    latent, head = architecture.latent, architecture.head_dim
    return CacheLayout(
        dtype=dtype,
        block_token_count=block_token_count,
        kv_head_count=architecture.kv_head_count,
        key_size=head if latent is None else latent.kv_rank + latent.rope_size,
        value_size=head if latent is None else latent.kv_rank,
        is_latent=latent is not None,
        scale=architecture.softmax_scale,
    )
