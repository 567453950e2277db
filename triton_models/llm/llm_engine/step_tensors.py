"""A step plan as the tensors that the model takes.

Owns the order of rows in a step: decodes first, shortest context first, so that neighbours can share
one padded attention call; then each prompt's chunk, and each decode with its drafts, which is computed
like one. Invariants: a row is one token of one sequence; every row belongs to exactly one attention group;
padding points at blocks of zeros, so that nothing of another sequence, not even a NaN, can reach a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from .batcher import StepPlan
from .transfer import to_device
from .window import Window


@dataclass(frozen=True, slots=True)
class RowWork:
    """Consecutive tokens of one sequence, all that a step must know of them; it can be sent to other ranks."""

    start: int
    """The first one's position."""
    token_ids: list[int]
    block_ids: list[int]
    """All of the sequence's blocks, but for those that the window hides from the first of these tokens."""
    sample_count: int
    """After how many of these, the last ones, a token is chosen: none, the last known one, or that and its drafts."""

    @property
    def count(self) -> int:
        """How many tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences whose rows attend in one call: `sequence_count` times `query_count` rows."""

    first_row: int
    sequence_count: int
    query_count: int
    blocks: torch.Tensor
    """[sequence_count, block_count] int64: the sequences' blocks in order, padded; of an unmasked chunk also hidden
    ones, as padding."""
    longest: int
    """Tokens that the row with the longest context sees; of an unmasked chunk, those before its end."""
    mask: torch.Tensor | None = None
    """[sequence_count, 1, group_size * query_count, context] compute dtype: 0 where a query sees a key."""
    lengths: torch.Tensor | None = None
    """[sequence_count] int64: tokens that each sees, of decodes that read blocks where they lie; without a mask."""
    hidden: torch.Tensor | None = None
    """[sequence_count] int64: tokens of its blocks, behind the window's first ones, that each does not see; beside
    `lengths`."""

    @property
    def rows(self) -> slice:
        """The group's rows in the step."""
        return slice(self.first_row, self.first_row + self.sequence_count * self.query_count)


@dataclass(frozen=True)
class StepTensors:
    """One step's input; `sampled` names works by their places in the plan, whose sampled rows `sample_rows` are, in
    order: as many as each work has."""

    works: list[RowWork]
    """What it was made of."""

    token_ids: torch.Tensor
    """[row_count] int64"""
    positions: torch.Tensor
    """[row_count] int64: places in their sequences."""
    slots: torch.Tensor
    """[row_count] int64: block * block_token_count + place in the block."""
    groups: list[AttentionGroup]
    sample_rows: torch.Tensor
    """[sampled_count] int64"""
    sampled: list[int]


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """What the tensors' shapes depend on beside the plan."""

    block_token_count: int
    padding_block: int
    group_size: int
    """Query heads to a KV head."""
    group_token_bound: int
    """Keys that one decode group gathers at most, so that on a CPU they stay in its cache."""
    reads_blocks: bool
    """Single rows attend to blocks where they lie: all decodes are one group, without a mask."""
    reads_chunks: bool
    """Prompts do, too."""
    window: Window
    dtype: torch.dtype
    device: torch.device


def row_works(plan: StepPlan) -> list[RowWork]:
    """What a plan computes, without the sequences."""
    return [
        RowWork(
            start=work.start,
            token_ids=[*work.sequence.token_ids[work.start : work.start + work.count], *work.draft_token_ids],
            block_ids=work.sequence.block_ids,
            sample_count=1 + len(work.draft_token_ids) if work.samples else 0,
        )
        for work in plan.work
    ]


def step_tensors(works: list[RowWork], layout: StepLayout) -> StepTensors:
    """Lay out a step's tokens as rows."""
    one, several = ([place for place, work in enumerate(works) if (work.count > 1) is more] for more in (False, True))
    order = sorted(one, key=lambda place: layout.window.seen_count(works[place].start)) + several
    ordered = [works[place] for place in order]
    decodes, prefills = ordered[: len(one)], ordered[len(one) :]
    counts, sample_counts = np.array([(work.count, work.sample_count) for work in ordered]).T
    # The kernels write as many rows as the groups have.
    assert counts.all(), "a work without tokens"
    ends = counts.cumsum()
    token_ids = np.fromiter(chain.from_iterable(work.token_ids for work in ordered), np.int64, ends[-1])
    groups = list(_decode_groups(decodes, layout))
    first_row = len(decodes)
    for work in prefills:
        chunk = _unmasked_chunk(work, first_row, layout) if layout.reads_chunks else _group([work], first_row, layout)
        groups.append(chunk)
        first_row += work.count
    return StepTensors(
        works=works,
        token_ids=_moved(token_ids, layout),
        positions=_moved(_ranges(np.array([work.start for work in ordered]), counts), layout),
        slots=_moved(_slots(ordered, layout), layout),
        groups=groups,
        sample_rows=_moved(_ranges(ends - sample_counts, sample_counts), layout),
        sampled=[place for place in order if works[place].sample_count],
    )


def step_tensors_after(
    works: list[RowWork], token_ids: torch.Tensor, rows: list[int], layout: StepLayout
) -> StepTensors:
    """Lay out a step of single tokens that the host does not know yet.

    Args:
        works: with any token in the place of each.
        token_ids: [count] int64, on the layout's device: what the step before chooses.
        rows: where in them each work's token stands.
    """
    step = step_tensors(works, layout)
    assert len(step.sampled) == len(step.token_ids) == len(rows)
    return replace(step, token_ids=token_ids[_moved(np.array([rows[place] for place in step.sampled]), layout)])


def _decode_groups(decodes: list[RowWork], layout: StepLayout) -> Iterator[AttentionGroup]:
    """Cut the decodes, which come sorted by length, where a group's padded keys pass the bound."""
    if layout.reads_blocks:
        if decodes:
            yield _unmasked_group(decodes, layout)
        return
    first = 0
    for end in range(1, len(decodes) + 1):
        grown = (end - first + 1) * _padded(decodes[min(end, len(decodes) - 1)], layout)
        if end == len(decodes) or grown > layout.group_token_bound:
            yield _group(decodes[first:end], first, layout)
            first = end


def _unmasked_chunk(work: RowWork, first_row: int, layout: StepLayout) -> AttentionGroup:
    hidden = _hidden_blocks(work, layout)
    blocks = work.block_ids[: hidden.start] + [layout.padding_block] * len(hidden) + work.block_ids[hidden.start :]
    return AttentionGroup(
        first_row=first_row,
        sequence_count=1,
        query_count=work.count,
        blocks=_moved(np.asarray(blocks), layout),
        longest=work.start + work.count,
    )


def _unmasked_group(works: list[RowWork], layout: StepLayout) -> AttentionGroup:
    """All decodes, which stand first."""
    padded = [_padded(work, layout) for work in works]
    blocks = np.zeros((len(works), max(padded) // layout.block_token_count), dtype=np.int64)
    for row, work in enumerate(works):
        used = work.block_ids[: blocks.shape[1]]
        blocks[row, : len(used)] = used
    lengths = np.array([layout.window.seen_count(work.start) for work in works])
    held = np.array([work.start + 1 - _absent_token_count(work, layout) for work in works])
    return AttentionGroup(
        first_row=0,
        sequence_count=len(works),
        query_count=1,
        blocks=_moved(blocks, layout),
        longest=int(lengths[-1]),
        lengths=_moved(lengths, layout),
        hidden=_moved(held - lengths, layout),
    )


def _group(works: list[RowWork], first_row: int, layout: StepLayout) -> AttentionGroup:
    """One attention call: several decodes, or one prompt's chunk. The last has the longest context."""
    context = max(_padded(work, layout) for work in works)
    query_count = works[0].count
    blocks = np.full((len(works), context // layout.block_token_count), layout.padding_block)
    for row, work in enumerate(works):
        used = _padded(work, layout) // layout.block_token_count
        blocks[row, :used] = work.block_ids[:used]
    hidden = _hidden(works, context, layout)
    mask = torch.zeros(hidden.shape, dtype=layout.dtype).masked_fill_(hidden, float("-inf"))
    mask = mask[:, None].expand(-1, layout.group_size if query_count > 1 else 1, -1, -1)
    return AttentionGroup(
        first_row=first_row,
        sequence_count=len(works),
        query_count=query_count,
        blocks=_moved(blocks, layout),
        longest=context,
        mask=mask.reshape(len(works), 1, -1, context).to(layout.device),
    )


def _hidden(works: list[RowWork], context: int, layout: StepLayout) -> torch.Tensor:
    """[sequence_count, query_count, context]: which of its blocks' tokens, padded, each row does not see."""
    window, rows = layout.window, torch.tensor([work.start for work in works])[:, None, None]
    rows = rows + torch.arange(works[0].count)[:, None]
    tokens, kept = torch.arange(context), layout.block_token_count * _hidden_blocks(works[0], layout).start
    absent = torch.tensor([_absent_token_count(work, layout) for work in works])
    tokens = tokens + absent[:, None, None] * (tokens >= kept)
    hidden = tokens > rows
    if rows.max() >= window.begins_at:
        hidden |= (rows >= window.begins_at) & (tokens >= window.sinks) & (tokens <= rows - window.newest)
    return hidden


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Consecutive numbers from each start on, one after the other."""
    before = counts.cumsum() - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _slots(works: list[RowWork], layout: StepLayout) -> np.ndarray:
    """[row_count] int64: where each row's key and value are kept."""
    size, slots = layout.block_token_count, []
    for work in works:
        absent, positions = len(_hidden_blocks(work, layout)), range(work.start, work.start + work.count)
        slots += [work.block_ids[place // size - absent] * size + place % size for place in positions]
    return np.array(slots)


def _padded(work: RowWork, layout: StepLayout) -> int:
    """The context that the work's last token may see, in whole blocks, but for those that the work lacks."""
    whole = -(-(work.start + work.count) // layout.block_token_count) * layout.block_token_count
    return whole - _absent_token_count(work, layout)


def _absent_token_count(work: RowWork, layout: StepLayout) -> int:
    return len(_hidden_blocks(work, layout)) * layout.block_token_count


def _hidden_blocks(work: RowWork, layout: StepLayout) -> range:
    """Those of the sequence's blocks that the work lacks."""
    return layout.window.hidden_blocks(work.start, layout.block_token_count)


def _moved(array: np.ndarray, layout: StepLayout) -> torch.Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)), layout.device)
