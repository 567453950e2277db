"""Matrix products with a model's weights, by the quickest way that this processor has.

Owns which types numbers have, and the choice of kernel. Invariants: the result of a row depends on the other
rows of a batch only by rounding; with fp32 weights there is no rounding below fp32.

On a CPU activations are fp32 between products, whatever type the weights have. A few rows cost what it costs
to read the weights, so they are multiplied with weights as narrow as the file has them; many rows cost
arithmetic, which is many times quicker in bf16 where the processor has such products (AVX512-BF16, AMX). Without
them (AVX2 alone), oneDNN multiplies bf16 six times slower than fp32.
"""

import platform
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .blocks import Blocks, Floats8, Weight
from .config import NARROW_DTYPES
from .cpu_kernels import CpuKernels, Narrowness, Packed
from .rowwise import Rowwise

if TYPE_CHECKING:
    from .gpu_attention import GpuAttention
    from .gpu_products import GpuExperts

# From so many rows on oneDNN's bf16 products are quicker than our own kernels for weights of sixteen bits that do not
# use the matrix unit.
_MANY_ROWS = 12


@dataclass(frozen=True)
class Compute:
    """What a rank computes with, and in which types."""

    device: torch.device
    dtype: torch.dtype
    """Of products of many rows."""
    activations: torch.dtype
    cached: torch.dtype
    """Of the KV cache."""
    kernels: CpuKernels | None
    narrowness: Narrowness = Narrowness.EXACT
    """Which of the kernels' products may be narrow."""
    attention: "CpuKernels | GpuAttention | None" = None
    """What attends to blocks where they lie; None: they are gathered for torch."""
    grouped_experts: "type[GpuExperts] | None" = None
    """What multiplies the rows of all experts at once; None: each expert multiplies its own."""


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type in which products of many rows run, with the engine's setting `dtype`."""
    if device.type == "cpu":
        return torch.bfloat16 if dtype in NARROW_DTYPES and _has_bf16_products() else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16}.get(dtype, torch.bfloat16)


def narrowness(dtype: str, kernels: CpuKernels | None) -> Narrowness:
    """Which of the kernels' products may be narrow, with the engine's setting `dtype`."""
    if kernels is None or dtype not in NARROW_DTYPES:
        return Narrowness.EXACT
    return Narrowness.BYTES if dtype == "w8a8" and kernels.narrowness == Narrowness.FEW_ROWS else kernels.narrowness


class Projection:
    """Multiplies rows by a weight [output size, input size], and adds a bias [output size] where there is one."""

    def __init__(
        self,
        weight: Weight,
        compute: Compute,
        *,
        bias: torch.Tensor | None = None,
        room: str | None = None,
    ) -> None:
        """`room`: the kernels' memory for results, which then hold until the next of that name; None: their own."""
        self._compute, self._room, kernels = compute, room, compute.kernels
        self._bias = None if bias is None else bias.to(compute.device, compute.activations)
        self._packed = self._dense = self._narrow = self._floats8 = None
        self._narrowness = compute.narrowness
        self._weight_first = compute.device.type == "cpu" and compute.dtype == torch.float32
        if isinstance(weight, Floats8):
            # It needs Triton's compiler, which is not everywhere.
            from .gpu_products import multiplied

            self._floats8 = partial(multiplied, weight=weight.to(compute.device))
            return
        self._packed = None if kernels is None else kernels.pack(weight, self._bias)
        # What the kernels can read is kept a second time only for products that are quicker than theirs.
        if self._packed is None or not self._takes_many_rows(weight):
            dense = weight.dense() if isinstance(weight, Blocks) else weight
            self._dense = dense.to(compute.device, compute.dtype)
        if self._packed is None and isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16:
            self._narrow = weight if compute.dtype == torch.float32 else None

    def __call__(
        self, rows: torch.Tensor, *, before: Rowwise | None = None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[row_count, input size] to [row_count, output size], in the type of activations.

        The result may be a transposed view, and what `before` reads may be overwritten.

        Args:
            before: what is done with the rows first.
            onto: the result is added to this, and comes back as this.
        """
        if self._packed is not None and (self._dense is None or len(rows) < _MANY_ROWS):
            assert self._compute.kernels is not None
            return self._compute.kernels.linear(
                self._packed,
                rows if rows.stride(1) == 1 else rows.contiguous(),
                before=before,
                onto=onto,
                room=self._room,
                narrowness=self._narrowness,
            )
        product = self._product(rows if before is None else before(rows)).to(self._compute.activations)
        if self._bias is not None:
            product.add_(self._bias)
        return product if onto is None else onto.add_(product)

    @property
    def packed(self) -> Packed | None:
        """The weight as the kernels have it; None where torch multiplies some rows."""
        return self._packed if self._dense is None else None

    def _takes_many_rows(self, weight: torch.Tensor | Blocks) -> bool:
        """Whether the kernels' products are the quickest for any number of rows, or nearly so."""
        if self._compute.dtype == torch.float32:
            return True
        if isinstance(weight, Blocks):
            return self._compute.kernels is not None and self._compute.kernels.are_quickest_in_bf16
        return self._narrowness == Narrowness.ANY_ROWS and weight.dtype != torch.float16

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._floats8 is not None:
            return self._floats8(rows)
        if self._narrow is not None and rows.shape[0] == 1:
            return F.linear(rows.to(self._narrow.dtype), self._narrow)
        assert self._dense is not None
        if self._weight_first:
            # MKL multiplies a few rows up to twice as fast with the large matrix on the left.
            return torch.mm(self._dense, rows.t()).t()
        return F.linear(rows.to(self._dense.dtype), self._dense)


class Embedding:
    """A row of [vocabulary, hidden size] for each token."""

    def __init__(self, weight: Weight, compute: Compute) -> None:
        if isinstance(weight, Floats8) or (isinstance(weight, Blocks) and compute.device.type != "cpu"):
            weight = weight.dense().to(compute.activations)
        self._weight = weight if isinstance(weight, Blocks) else weight.to(compute.device)
        self._compute = compute

    def __len__(self) -> int:
        return self._weight.shape[0]

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[row_count] int64 to [row_count, hidden size], in the type of activations."""
        if isinstance(self._weight, Blocks):
            found = self._weight.rows(token_ids).dense()
        else:
            found = F.embedding(token_ids, self._weight)
        return found.to(self._compute.activations)


def _has_bf16_products() -> bool:
    """Whether the processor multiplies bf16; where AVX-512 has no such products, oneDNN emulates them and says yes."""
    if platform.machine() == "x86_64":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return probe is not None and bool(probe())
