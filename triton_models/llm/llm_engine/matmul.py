"""Matrix products with a model's weights, by the quickest way that this processor has.

Owns which types numbers have, and the choice of kernel. Invariants: the result of a row depends on the other
rows of a batch only by rounding; with fp32 weights there is no rounding below fp32.

On a CPU activations are fp32, whatever type the weights have. A few rows cost what it costs to read the
weights, so they are multiplied with weights as narrow as the file has them; many rows cost arithmetic, which is
several times quicker in bf16 where the processor has such products (AVX512-BF16, AMX). Without them (AVX2
alone), oneDNN multiplies bf16 six times slower than fp32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .blocks import Blocks
from .cpu_kernels import CpuKernels

# From so many rows on bf16 products are quicker than our own kernels, where the processor has them.
_MANY_ROWS = 12


@dataclass(frozen=True)
class Compute:
    """What a rank computes with, and in which types."""

    device: torch.device
    dtype: torch.dtype
    """Of products of many rows, and of the KV cache."""
    activations: torch.dtype
    kernels: CpuKernels | None


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type in which products of many rows run, with the engine's setting `dtype`."""
    if device.type == "cpu":
        return torch.bfloat16 if dtype == "bf16" and _has_bf16_products() else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16}.get(dtype, torch.bfloat16)


class Projection:
    """Multiplies rows by a weight [output size, input size], and adds a bias [output size] where there is one."""

    def __init__(self, weight: torch.Tensor | Blocks, compute: Compute, *, bias: torch.Tensor | None = None) -> None:
        self._compute = compute
        self._packed = None if compute.kernels is None else compute.kernels.pack(weight)
        self._bias = None if bias is None else bias.to(compute.device, compute.activations)
        # What the kernels can read is kept a second time only for products that are quicker than theirs.
        self._dense = None
        if self._packed is None or compute.dtype != torch.float32:
            dense = weight.dense() if isinstance(weight, Blocks) else weight
            self._dense = dense.to(compute.device, compute.dtype)
        self._narrow = None
        if self._packed is None and isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16:
            self._narrow = weight if compute.dtype == torch.float32 else None
        self._weight_first = compute.device.type == "cpu" and compute.dtype == torch.float32

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[row_count, input size] to [row_count, output size], in the type of activations.

        The result may be a transposed view.
        """
        if self._packed is not None and (self._dense is None or len(rows) < _MANY_ROWS):
            assert self._compute.kernels is not None
            return self._compute.kernels.linear(self._packed, rows, self._bias)
        product = self._product(rows).to(self._compute.activations)
        return product if self._bias is None else product.add_(self._bias)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._narrow is not None and rows.shape[0] == 1:
            return F.linear(rows.to(self._narrow.dtype), self._narrow)
        assert self._dense is not None
        if self._weight_first:
            # MKL multiplies a few rows up to twice as fast with the large matrix on the left.
            return torch.mm(self._dense, rows.t()).t()
        return F.linear(rows.to(self._dense.dtype), self._dense)


class Embedding:
    """A row of [vocabulary, hidden size] for each token."""

    def __init__(self, weight: torch.Tensor | Blocks, compute: Compute) -> None:
        self._weight = weight if isinstance(weight, Blocks) else weight.to(compute.device)
        self._compute = compute

    def __len__(self) -> int:
        return self._weight.shape[0]

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[row_count] int64 to [row_count, hidden size], in the type of activations."""
        if isinstance(self._weight, Blocks):
            found = self._weight.rows(token_ids.cpu()).dense().to(self._compute.device)
        else:
            found = F.embedding(token_ids, self._weight)
        return found.to(self._compute.activations)


def _has_bf16_products() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return probe is not None and bool(probe())
