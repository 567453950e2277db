"""What is done with rows before they are multiplied. Pure, beside torch; `kernels/products.c` does the same."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang and Sennrich, 2019) with a weight [size]."""

    weight: torch.Tensor
    epsilon: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[row_count, size], both ways; torch sums in fp32."""
        return F.rms_norm(rows, self.weight.shape, self.weight, self.epsilon)


class SwiGlu:
    """SwiGLU (Shazeer, 2020) of gates and what they are for, side by side."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[row_count, 2 * size] to [row_count, size]; `rows` is overwritten."""
        gate, up = rows.chunk(2, dim=-1)
        # In place: fresh memory for each of these costs a prefill more than the arithmetic.
        return F.silu(gate, inplace=True).mul_(up)


Rowwise = Norm | SwiGlu
