"""Matrix products with a model's weights, by the quickest way that this processor has.

Owns which type products run in, and the choice of kernel. Invariants: the result of a row depends on
the other rows of a batch only by rounding; with fp32 weights there is no rounding below fp32.

On a CPU without bf16 products (AVX2 alone), oneDNN multiplies bf16 one row at a time: at 32 rows six
times slower than fp32. There the weights are kept twice: as bf16, which reads half the memory and is
three times quicker for a single row, and as fp32 for everything else.
"""

import torch
import torch.nn.functional as F


def compute_dtype(weight_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which products with such weights run, and in which activations are kept."""
    if weight_dtype == torch.bfloat16 and device.type == "cpu" and not _has_bf16_products():
        return torch.float32
    return weight_dtype


class Projection:
    """Multiplies rows by a weight [output size, input size], and adds a bias [output size] where there is one."""

    def __init__(
        self, weight: torch.Tensor, dtype: torch.dtype, device: torch.device, *, bias: torch.Tensor | None = None
    ) -> None:
        self._narrow = weight.to(device) if dtype != weight.dtype else None
        self.weight = weight.to(device, dtype)
        self._bias = None if bias is None else bias.to(device, dtype)
        self._weight_first = device.type == "cpu" and dtype == torch.float32

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[row_count, input size] to [row_count, output size], in the weight's compute type.

        The result may be a transposed view.
        """
        product = self._product(rows)
        return product if self._bias is None else product.add_(self._bias)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._narrow is not None and rows.shape[0] == 1:
            return F.linear(rows.to(self._narrow.dtype), self._narrow).to(rows.dtype)
        if self._weight_first:
            # MKL multiplies a few rows up to twice as fast with the large matrix on the left.
            return torch.mm(self.weight, rows.t()).t()
        return F.linear(rows, self.weight)


def _has_bf16_products() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return probe is not None and bool(probe())
