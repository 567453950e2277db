"""A mixture's experts on a GPU: all of them in two launches, of a kernel in Triton's language.

Owns the kernel, and how rows are dealt out to it. The pairs of a row and one of its experts are put in the order of
their experts, and cut into blocks of one expert each; a program multiplies one block by some columns of its expert's
matrix. Invariants: nothing waits for the device; what is launched depends on the shapes of its arguments alone, so that
it can be part of a CUDA graph; each pair's result is written once, so that sums have one order.
"""

import torch
import triton
import triton.language as tl

from .rowwise import SwiGlu

_FEW_LINES, _MANY_LINES = (
    16,
    64,
)  # pairs of a block: what a tensor core multiplies at least, and where experts have many
_COLUMNS = 64
_DEPTH = 64  # numbers of a row that are multiplied at a time
_SWIGLU = SwiGlu()


class GpuExperts:
    """The SwiGLUs of the experts that a rank has, one at least.

    Args:
        gate_up: [expert_count, 2 * intermediate_size, hidden_size].
        down: [expert_count, hidden_size, intermediate_size].
        here: which of the model's experts these are.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, here: range) -> None:
        self._gate_up, self._down, self._here = gate_up, down, here

    def add(self, rows: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, onto: torch.Tensor) -> None:
        """As `EachExpert.add`."""
        row_count, per_row = chosen.shape
        expert_count = len(self._here)
        experts = chosen.flatten() - self._here.start
        # What other ranks have comes last, and no block reaches it.
        experts = torch.where((experts >= 0) & (experts < expert_count), experts, expert_count)
        lines = _MANY_LINES if experts.numel() >= _MANY_LINES * expert_count else _FEW_LINES
        blocks = _Blocks(experts, expert_count, lines)
        inner = rows.new_empty(experts.numel(), self._gate_up.shape[1])
        _launch(blocks, rows, self._gate_up, inner, divisor=per_row)
        results = rows.new_zeros(experts.numel(), self._down.shape[1])
        _launch(blocks, _SWIGLU(inner).contiguous(), self._down, results, divisor=1)
        of_rows = results.view(row_count, per_row, -1) * shares.unsqueeze(-1).to(rows.dtype)
        onto.add_(of_rows.sum(dim=1))


class _Blocks:
    """Pairs in the order of their experts, cut into blocks; all of it on the device.

    Attributes:
        order: [pair_count] the pairs, those of the same expert one after the other.
        experts: [block_count] whose each block is; `expert_count` for those without pairs, of which there may be many.
        begins: [block_count] where in the order a block's pairs begin.
        ends: [expert_count] where an expert's pairs end.
    """

    def __init__(self, experts: torch.Tensor, expert_count: int, lines: int) -> None:
        self.lines, self.expert_count = lines, expert_count
        self.order = experts.argsort(stable=True)
        counts = experts.new_zeros(expert_count + 1).scatter_add_(0, experts, torch.ones_like(experts))[:-1]
        block_counts = (counts + lines - 1) // lines
        self.ends, block_ends = counts.cumsum(0), block_counts.cumsum(0)
        # Each expert's last block may not be full, and there are no more blocks than pairs.
        pair_count = experts.numel()
        numbers = torch.arange(min(pair_count, pair_count // lines + expert_count), device=experts.device)
        self.experts = torch.searchsorted(block_ends, numbers, right=True)
        known = self.experts.clamp(max=expert_count - 1)
        first_blocks = block_ends[known] - block_counts[known]
        self.begins = self.ends[known] - counts[known] + (numbers - first_blocks) * lines


def _launch(blocks: _Blocks, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, *, divisor: int) -> None:
    """Multiply a row by its expert's matrix for each pair: pair p has row p // divisor, and gives row p of `out`."""
    assert rows.is_contiguous() and weights.is_contiguous() and out.is_contiguous()
    _, output_size, input_size = weights.shape
    _multiply[(len(blocks.experts), triton.cdiv(output_size, _COLUMNS))](
        rows, weights, out, blocks.order, blocks.experts, blocks.begins, blocks.ends,
        EXPERTS=blocks.expert_count, DIVISOR=divisor, INPUT=input_size, OUTPUT=output_size,
        LINES=blocks.lines, COLUMNS=_COLUMNS, DEPTH=_DEPTH,
    )  # fmt: skip


@triton.jit
def _multiply(
    rows, weights, out, order, experts, begins, ends,
    EXPERTS: tl.constexpr, DIVISOR: tl.constexpr, INPUT: tl.constexpr, OUTPUT: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One block of pairs by COLUMNS columns of their expert's matrix [OUTPUT, INPUT]."""
    expert = tl.load(experts + tl.program_id(0))
    if expert < EXPERTS:
        places = tl.load(begins + tl.program_id(0)) + tl.arange(0, LINES)
        is_line = places < tl.load(ends + expert)
        pairs = tl.load(order + places, mask=is_line, other=0)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = columns < OUTPUT
        of_row = rows + (pairs // DIVISOR) * INPUT
        of_column = weights + (expert * OUTPUT + columns) * INPUT
        total = tl.zeros([LINES, COLUMNS], tl.float32)
        for first in range(0, INPUT, DEPTH):
            numbers = first + tl.arange(0, DEPTH)
            is_number = numbers < INPUT
            row = tl.load(of_row[:, None] + numbers[None, :], mask=is_line[:, None] & is_number[None, :], other=0.0)
            weight = tl.load(
                of_column[None, :] + numbers[:, None], mask=is_column[None, :] & is_number[:, None], other=0.0
            )
            total += tl.dot(row, weight, input_precision="ieee")
        tl.store(
            out + pairs[:, None] * OUTPUT + columns[None, :],
            total.to(out.dtype.element_ty),
            mask=is_line[:, None] & is_column[None, :],
        )
