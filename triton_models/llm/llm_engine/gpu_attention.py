"""Attention over KV blocks where they lie, on a GPU: a kernel in Triton's language (Tillet et al., 2019).

Owns the kernel, and how a step's rows are cut for it. One program takes the query heads that share a KV head, of one
sequence's row or of neighbouring rows of a prompt, and a split of their context; the splits are put together as in
FlashDecoding (Dao et al., 2023). Invariants: nothing waits for the device; what is launched depends on the shapes of
its arguments and on `longest` alone, so that it can be part of a CUDA graph; a row depends on its own sequence alone.

Triton's compiler comes with torch's builds for CUDA. With TRITON_INTERPRET=1 the kernel runs on a CPU, for tests.
"""

import torch
import triton
import triton.language as tl

from .cache_layout import CacheLayout
from .step_tensors import AttentionGroup
from .window import FULL, Window

_LINES = 16  # heads and rows that a program takes at least: what a tensor core multiplies
_PROMPT_LINES = 64  # and at most, of a prompt
_HEADS = 16  # of those that share a KV head, as many as a program takes; a latent's keys are long, and all heads' one
_TOKENS = 32  # whose keys are read at a time
_SPLIT_TOKENS = 128  # of a context, that a program of its own is worth
_MOST_SPLITS = 32
_ENOUGH_PROGRAMS = 2048  # a GPU has up to 150 multiprocessors, each with room for several
_WIDE_KEY = 256  # beyond, the next tokens' keys and values find no room beside these
_LOG2_E = 1.4426950408889634


class GpuAttention:
    """`CpuKernels.attend` on a GPU. Queries and the result have the type of activations."""

    def can_attend(self, layout: CacheLayout) -> bool:
        """Any sizes and type."""
        return True

    can_attend_chunks = can_attend

    def attend(
        self,
        queries: torch.Tensor,
        cache: torch.Tensor,
        layout: CacheLayout,
        group: AttentionGroup,
        window: Window,
        out: torch.Tensor,
    ) -> None:
        """The arguments are those of `CpuKernels.attend`; a window that hides anything has no kernel here."""
        assert window is FULL
        _launch(queries[group.rows], cache, layout, group, out[group.rows])


def _launch(
    queries: torch.Tensor, cache: torch.Tensor, layout: CacheLayout, group: AttentionGroup, out: torch.Tensor
) -> None:
    row_count, head_count, key_size = queries.shape
    sharing = head_count // layout.kv_head_count
    is_decode, longest = group.lengths is not None, group.longest
    blocks = group.blocks if is_decode else group.blocks.unsqueeze(0)
    lengths = group.lengths if is_decode else group.blocks
    heads = min(sharing, _HEADS)
    rows_of_tile = 1 if is_decode else max(1, _PROMPT_LINES // heads)
    lines = max(_LINES, triton.next_power_of_2(rows_of_tile * heads))
    tiles = triton.cdiv(row_count, rows_of_tile)
    parts = layout.kv_head_count * triton.cdiv(sharing, heads)
    most_splits = min(_MOST_SPLITS, triton.cdiv(longest, _SPLIT_TOKENS), triton.cdiv(_ENOUGH_PROGRAMS, tiles * parts))
    splits = most_splits if is_decode else 1
    whole = splits == 1
    results = out if whole else out.new_empty(splits, *out.shape, dtype=torch.float32)
    sums = queries.new_empty(splits, row_count, head_count, dtype=torch.float32)
    key_lanes = 1 << (key_size.bit_length() - 1)
    _attend[(tiles, parts, splits)](
        queries, cache, blocks, lengths, results, sums,
        row_count, longest - row_count, queries.stride(0), blocks.stride(0), layout.scale * _LOG2_E,
        IS_DECODE=is_decode, SPLITS=splits, LEAST=_SPLIT_TOKENS, HEADS=head_count, GROUP=sharing, TAKEN=heads,
        ROWS=rows_of_tile, LINES=lines, TOKENS=_TOKENS, TOKEN_SIZE=layout.token_size,
        BLOCK_TOKENS=layout.block_token_count, VALUES_AT=layout.values_at,
        KEY=key_size, KEY_LANES=key_lanes, REST_LANES=_rest_lanes(key_size - key_lanes),
        VALUE=layout.value_size, VALUE_LANES=triton.next_power_of_2(layout.value_size),
        num_stages=1 if key_size > _WIDE_KEY else 3,
    )  # fmt: skip
    if not whole:
        # A split that a row does not reach has the sum -inf, and no share.
        shares = sums.softmax(dim=0).unsqueeze(-1)
        out.copy_((results.nan_to_num(0.0) * shares).sum(dim=0))


def _rest_lanes(rest: int) -> int:
    """Lanes for what a key has beyond a power of two: 0, or as many as a tensor core multiplies at least."""
    return max(16, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def _attend(
    queries, cache, blocks, lengths, results, sums,
    row_count, start, query_stride, blocks_stride, scale,
    IS_DECODE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    TAKEN: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, TOKENS: tl.constexpr, TOKEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, VALUES_AT: tl.constexpr, KEY: tl.constexpr, KEY_LANES: tl.constexpr,
    REST_LANES: tl.constexpr, VALUE: tl.constexpr, VALUE_LANES: tl.constexpr,
):  # fmt: skip
    """Queries [row_count, HEADS, KEY] of one tile and KV head; a line is a head of a row.

    A key is KEY_LANES numbers and a rest, for whose sake a latent's 576 would take the room of 1,024.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    kv_head, part = tl.program_id(1) // tl.cdiv(GROUP, TAKEN), tl.program_id(1) % tl.cdiv(GROUP, TAKEN)
    lines = tl.arange(0, LINES)
    rows = tile * ROWS + lines // TAKEN
    of_group = part * TAKEN + lines % TAKEN
    heads = kv_head * GROUP + of_group
    is_line = (lines < ROWS * TAKEN) & (of_group < GROUP) & (rows < row_count)
    key_lanes, value_lanes = tl.arange(0, KEY_LANES), tl.arange(0, VALUE_LANES)
    if IS_DECODE:
        table = blocks + tile * blocks_stride
        longest = tl.load(lengths + tile)
        seen = tl.zeros([LINES], tl.int64) + longest
    else:
        table = blocks
        longest = start + tl.minimum(tile * ROWS + ROWS, row_count)
        seen = (start + rows + 1).to(tl.int64)
    of_query = queries + rows[:, None] * query_stride + heads[:, None] * KEY
    query = tl.load(of_query + key_lanes[None, :], mask=is_line[:, None], other=0.0).to(cache.dtype.element_ty)
    if REST_LANES > 0:
        rest_lanes = KEY_LANES + tl.arange(0, REST_LANES)
        is_rest = rest_lanes < KEY
        query_rest = tl.load(of_query + rest_lanes[None, :], mask=is_line[:, None] & is_rest[None, :], other=0.0)
        query_rest = query_rest.to(cache.dtype.element_ty)
    largest = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    value = tl.zeros([LINES, VALUE_LANES], tl.float32)
    # A graph is launched for the longest context; each sequence is cut by its own.
    split_tokens = tl.maximum(tl.cdiv(tl.cdiv(longest, SPLITS), TOKENS) * TOKENS, LEAST) if SPLITS > 1 else longest
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, longest)
    for begin in range(first, last, TOKENS):
        tokens = begin + tl.arange(0, TOKENS)
        is_token = tokens < last
        block = tl.load(table + tokens // BLOCK_TOKENS, mask=is_token, other=0)
        places = (block * BLOCK_TOKENS + tokens % BLOCK_TOKENS) * TOKEN_SIZE
        of_key = cache + places[None, :] + kv_head * KEY
        keys = tl.load(of_key + key_lanes[:, None], mask=is_token[None, :], other=0.0)
        scores = tl.dot(query, keys, input_precision="ieee")
        if REST_LANES > 0:
            rests = tl.load(of_key + rest_lanes[:, None], mask=is_token[None, :] & is_rest[:, None], other=0.0)
            scores += tl.dot(query_rest, rests, input_precision="ieee")
        scores = tl.where(is_token[None, :] & (tokens[None, :] < seen[:, None]), scores * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # Nothing seen yet: any finite number keeps -inf - -inf away.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        values = tl.load(
            cache + places[:, None] + VALUES_AT + kv_head * VALUE + value_lanes[None, :],
            mask=is_token[:, None] & (value_lanes[None, :] < VALUE),
            other=0.0,
        )
        value = value * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        largest = larger
    of_line = (split * row_count + rows) * HEADS + heads
    tl.store(
        results + of_line[:, None] * VALUE + value_lanes[None, :],
        (value / total[:, None]).to(results.dtype.element_ty),
        mask=is_line[:, None] & (value_lanes[None, :] < VALUE),
    )
    if SPLITS > 1:
        # In powers of e, as softmax takes them.
        tl.store(sums + of_line, (largest + tl.log2(total)) * 0.6931471805599453, mask=is_line)
