"""Products on a GPU that torch has none for: of a mixture's experts, and with eight-bit floats.

Owns the kernel, in Triton's language, and how rows are dealt out to it. A mixture's pairs of a row and one of its
experts are put in the order of their experts, and cut into blocks of one expert each; a program multiplies one block by
some columns of its expert's matrix. Eight-bit floats become wider where they are multiplied, and each group's sum is
scaled. Invariants: nothing waits for the device; what is launched depends on the shapes of its arguments alone, so that
it can be part of a CUDA graph; each pair's result is written once, so that sums have one order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .blocks import Floats8
from .fp8 import SHORTEST_GROUP
from .rowwise import SwiGlu

_FEW_LINES, _MANY_LINES = 16, 64  # rows of a block: what a tensor core multiplies at least, and where there are many
_COLUMNS = 64
_DEPTH = 64  # numbers of a row that are multiplied at a time, where no group is shorter
_SWIGLU = SwiGlu()


class GpuExperts:
    """The SwiGLUs of the experts that a rank has, one at least.

    Args:
        gate_up: [expert_count * 2 * intermediate_size, hidden_size].
        down: [expert_count * hidden_size, intermediate_size].
        here: which of the model's experts these are.
    """

    def __init__(self, gate_up: torch.Tensor | Floats8, down: torch.Tensor | Floats8, here: range) -> None:
        self._gate_up, self._down, self._here = gate_up, down, here

    def add(self, rows: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, onto: torch.Tensor) -> None:
        """As `EachExpert.add`."""
        row_count, per_row = chosen.shape
        expert_count = len(self._here)
        experts = chosen.flatten() - self._here.start
        # What other ranks have comes last, and no block reaches it.
        experts = torch.where((experts >= 0) & (experts < expert_count), experts, expert_count)
        lines = _MANY_LINES if experts.numel() >= _MANY_LINES * expert_count else _FEW_LINES
        dealt = _dealt(experts, expert_count, lines)
        inner = rows.new_empty(experts.numel(), self._gate_up.shape[0] // expert_count)
        _launch(rows, self._gate_up, inner, dealt, divisor=per_row)
        results = rows.new_zeros(experts.numel(), self._down.shape[0] // expert_count)
        _launch(_SWIGLU(inner).contiguous(), self._down, results, dealt)
        of_rows = results.view(row_count, per_row, -1) * shares.unsqueeze(-1).to(rows.dtype)
        onto.add_(of_rows.sum(dim=1))


def multiplied(rows: torch.Tensor, weight: Floats8) -> torch.Tensor:
    """[row_count, input size] to [row_count, output size], in the type of the rows."""
    out = rows.new_empty(len(rows), weight.shape[0])
    _launch(rows.contiguous(), weight, out)
    return out


@dataclass(frozen=True)
class _Dealt:
    """Pairs in the order of their experts, cut into blocks; all of it on the device."""

    lines: int
    """Of a block."""
    expert_count: int
    order: torch.Tensor
    """[pair_count] the pairs, those of the same expert one after the other."""
    experts: torch.Tensor
    """[block_count] whose each block is; `expert_count` for those without pairs, of which there may be many."""
    begins: torch.Tensor
    """[block_count] where in the order a block's pairs begin."""
    ends: torch.Tensor
    """[expert_count] where an expert's pairs end."""


def _dealt(experts: torch.Tensor, expert_count: int, lines: int) -> _Dealt:
    """Deal out pairs, given each one's expert; those of `expert_count` go to nobody."""
    pair_count = experts.numel()
    counts = experts.new_zeros(expert_count + 1).scatter_add_(0, experts, torch.ones_like(experts))[:-1]
    block_counts = (counts + lines - 1) // lines
    ends, block_ends = counts.cumsum(0), block_counts.cumsum(0)
    # Each expert's last block may not be full, and there are no more blocks than pairs.
    numbers = torch.arange(min(pair_count, pair_count // lines + expert_count), device=experts.device)
    owners = torch.searchsorted(block_ends, numbers, right=True)
    known = owners.clamp(max=expert_count - 1)
    begins = ends[known] - counts[known] + (numbers - block_ends[known] + block_counts[known]) * lines
    return _Dealt(lines, expert_count, experts.argsort(stable=True), owners, begins, ends)


def _launch(
    rows: torch.Tensor, weight: torch.Tensor | Floats8, out: torch.Tensor, dealt: _Dealt | None = None, divisor: int = 1
) -> None:
    """Multiply a row by its expert's matrix for each pair: pair p has row p // divisor, and gives row p of `out`.

    Without `dealt` the weight is one matrix, and each row a pair.
    """
    numbers, scales, group = weight, None, 0
    if isinstance(weight, Floats8):
        numbers, scales, group = weight.numbers, weight.scales, weight.group_size
    assert isinstance(numbers, torch.Tensor)
    assert all(part is None or part.is_contiguous() for part in (rows, numbers, scales, out))
    output_size, input_size = out.shape[1], rows.shape[1]
    if dealt is None:
        lines = _MANY_LINES if len(rows) > _FEW_LINES else _FEW_LINES
        block_count, tables = triton.cdiv(len(rows), lines), (numbers,) * 4
    else:
        lines, block_count = dealt.lines, len(dealt.experts)
        tables = (dealt.order, dealt.experts, dealt.begins, dealt.ends)
    depth = next(size for size in (_DEPTH, 32, SHORTEST_GROUP) if group % size == 0)
    _multiply[(block_count, triton.cdiv(output_size, _COLUMNS))](
        rows, numbers, numbers if scales is None else scales, out, *tables, len(rows),
        EXPERTS=0 if dealt is None else dealt.expert_count, DIVISOR=divisor, INPUT=input_size, OUTPUT=output_size,
        GROUP=group, LINES=lines, COLUMNS=_COLUMNS, DEPTH=depth,
    )  # fmt: skip


@triton.jit
def _multiply(
    rows, weights, scales, out, order, experts, begins, ends, row_count,
    EXPERTS: tl.constexpr, DIVISOR: tl.constexpr, INPUT: tl.constexpr, OUTPUT: tl.constexpr,
    GROUP: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One block of pairs by COLUMNS columns of their expert's matrix [OUTPUT, INPUT]; of one matrix EXPERTS is 0.

    A GROUP of inputs has a scale, [OUTPUT, groups]; 0 is without.
    """
    lines = tl.arange(0, LINES)
    if EXPERTS == 0:
        matrix = 0
        pairs = tl.program_id(0) * LINES + lines
        is_line = pairs < row_count
        is_used = True
    else:
        expert = tl.load(experts + tl.program_id(0))
        is_used = expert < EXPERTS
        places = tl.load(begins + tl.program_id(0)) + lines
        is_line = is_used & (places < tl.load(ends + tl.minimum(expert, EXPERTS - 1)))
        pairs = tl.load(order + places, mask=is_line, other=0)
        matrix = expert * OUTPUT
    if is_used:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = columns < OUTPUT
        of_row = rows + (pairs // DIVISOR).to(tl.int64) * INPUT
        of_column = (matrix + columns).to(tl.int64)
        total = tl.zeros([LINES, COLUMNS], tl.float32)
        for first in range(0, INPUT, DEPTH):
            numbers = first + tl.arange(0, DEPTH)
            is_number = numbers < INPUT
            row = tl.load(of_row[:, None] + numbers[None, :], mask=is_line[:, None] & is_number[None, :], other=0.0)
            weight = tl.load(
                weights + of_column[None, :] * INPUT + numbers[:, None],
                mask=is_column[None, :] & is_number[:, None],
                other=0.0,
            )
            part = tl.dot(row, weight.to(row.dtype), input_precision="ieee")
            if GROUP > 0:
                of_group = scales + of_column * tl.cdiv(INPUT, GROUP) + first // GROUP
                part *= tl.load(of_group, mask=is_column, other=0.0)[None, :]
            total += part
        tl.store(
            out + pairs.to(tl.int64)[:, None] * OUTPUT + columns[None, :],
            total.to(out.dtype.element_ty),
            mask=is_line[:, None] & is_column[None, :],
        )
